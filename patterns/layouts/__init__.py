"""Layouts: how tokens lie: grids in boxes, so that tiles are boxes of space; tokens by their remainders; keys sorted in
segments."""
