"""Reducers: one file each, one frozen dataclass each."""

from .evict import Evict

__all__ = ["Evict"]
