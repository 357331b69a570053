"""Trials of our adapters for `tokenprune doctor`: tiny models, and vanilla runs by hand.

Nothing here uses the adapters: kept tokens come from the model's own attention maps, and the
prompts that are left are put together token by token.
"""
