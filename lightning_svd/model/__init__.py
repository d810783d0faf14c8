"""A tree of modules: which of its layers are factorized, and that done."""
