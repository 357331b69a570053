"""Models of transformers. Nothing else reads its modules, caches and calls."""
