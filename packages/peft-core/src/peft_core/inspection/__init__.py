"""Looking at a model: counts, status of layers and of the whole."""
