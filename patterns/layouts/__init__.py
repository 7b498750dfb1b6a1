"""Layouts: in which order the tokens of a grid lie so that tiles of slots are boxes of space (design D9)."""
