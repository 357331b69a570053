"""Trials of our adapters for `tokenprune doctor`: tiny models, and vanilla runs by hand.

Nothing here uses the adapters: kept tokens come from the model's own attention maps. Of the three
LLaVA models, prompts that are left are put together token by token; of families, what is dropped
is hidden by masks (`oracle.py`, which the contract of families uses as well).
"""
