"""The mask interpreter: from the code that built a mask tensor to a predicate over b, h, q and k."""
