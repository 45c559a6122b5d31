"""The base model: under its original names, what its layers are, its weights, and what its forward takes."""
