"""Specs: the user's file or value that says which pattern each head of each site gets.

`load_spec` reads a file, `Spec.of` whatever a user may give, `Spec.resolve` hands out patterns. The parts, in the
order in which they work: `reader` (text to plain values with positions), `document` (fields and types, the JSON
Schema), `forms` (a form to a pattern), `rules` (sites and heads), `spec`; `dump` goes back.
"""

from sparsify.errors import SpecError
from sparsify.spec.document import schema
from sparsify.spec.rules import SiteInfo
from sparsify.spec.spec import Spec, load_spec, unmatched_rules

__all__ = ["SiteInfo", "Spec", "SpecError", "load_spec", "schema", "unmatched_rules"]
