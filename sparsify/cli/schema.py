"""`sparsify schema`."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON Schema of a spec file, for editors that complete and check as you type.

    sparsify schema > sparsify.schema.json, then begin your spec with the line
    "# yaml-language-server: $schema=sparsify.schema.json" (VS Code with the YAML extension, Neovim, Zed, Emacs and all
    that run yaml-language-server), or map the file in the settings of JetBrains IDEs (JSON Schema Mappings).
    """
    from sparsify.cli.output import print_json
    from sparsify.spec import schema as published

    print_json(published())
