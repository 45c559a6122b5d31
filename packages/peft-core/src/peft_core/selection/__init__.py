"""Which adapters act now, for a model, a layer, a thread or a row; and the cache scope."""
