"""Where weights live and how they act: the base of all adapter layers, what a base layer is, merging, routing."""
