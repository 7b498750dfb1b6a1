"""Plans from elsewhere as specs: MoA, DuoAttention, MInference, scores of retrieval heads.

    from sparsify import imports
    spec = imports.read("moa_alpha_beta.json")            # the format is told by looking
    spec = imports.read("attn_patterns/Llama-3-8B", sparsity=0.5, query_heads=32)

Each format is one file that says how its files look, which options they leave open, and which preset each head gets;
`plan` holds what a file said, `source` reads it. Nothing here needs torch.
"""

from sparsify.imports.formats import FORMATS, load, read
from sparsify.imports.plan import Imported

__all__ = ["FORMATS", "Imported", "load", "read"]
