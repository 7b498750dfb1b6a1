"""sparsify.passes."""

if __name__ != "sparsify.passes":
    raise ImportError("import sparsify.passes, not the bare folder passes")
