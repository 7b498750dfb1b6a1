"""Measuring sparsify beside its peers: `sparsify bench`."""
