"""Virtual tokens in a call: embeddings, caches, masks."""
