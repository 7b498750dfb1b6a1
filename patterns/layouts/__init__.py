"""Layouts: how tokens lie: grids in boxes, so that tiles are boxes of space, and keys sorted in segments (D9)."""
