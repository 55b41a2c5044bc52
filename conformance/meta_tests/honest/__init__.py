"""Right backends of other kinds than the reference and the optimized one: the properties must pass them."""
