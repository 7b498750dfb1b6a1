"""The Triton target: tile programs as Triton kernels for NVIDIA and AMD GPUs."""

from sparsify.codegen.triton.target import TritonTarget

__all__ = ["TritonTarget"]
