"""Layouts: in which order tokens lie: grids in boxes, so that a tile is a box of space; keys sorted in segments (D9)."""
