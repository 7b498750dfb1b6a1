"""`sparsify tune`: finds how the kernels that somebody needs run fastest on this machine."""
