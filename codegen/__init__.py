"""sparsify.codegen."""

if __name__ != "sparsify.codegen":
    raise ImportError("import sparsify.codegen, not the bare folder codegen")
