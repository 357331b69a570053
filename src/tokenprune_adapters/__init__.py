"""Adapters that connect tokenprune to models. Each imports its framework only when it is used."""
