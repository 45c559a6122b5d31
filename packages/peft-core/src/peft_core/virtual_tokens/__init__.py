"""Where virtual tokens go: embeddings, caches, masks; entered only when a call has some."""
