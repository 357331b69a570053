"""Vision towers of open_clip: their signals, and reduction inside them."""
