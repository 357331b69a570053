"""Kit for adapters: what every model adapter needs, stated against tensors alone."""
