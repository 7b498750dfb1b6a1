"""Forms: how model code spells attention, and the q, k, v, scale and masks behind each spelling."""
