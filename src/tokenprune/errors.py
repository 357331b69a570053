"""Errors. Each is a `TokenpruneError` and also the built-in that it resembles."""

from __future__ import annotations


class TokenpruneError(Exception):
    """Base of every error that tokenprune raises on purpose."""


class ShapeError(TokenpruneError, ValueError):
    """A tensor has the wrong axes, dtype or device."""


class PlanError(TokenpruneError, ValueError):
    """A plan that no reducer may make: a slot kept twice, out of order, or not there."""


class BudgetError(TokenpruneError, ValueError):
    """A budget that cannot be met: zero before the LLM, negative, a fraction above one."""


class ScoreError(TokenpruneError, ValueError):
    """A scorer returned something that cannot be ranked."""


class SpecError(TokenpruneError, ValueError):
    """A spec such as ``"cls-attention | evict(128)"`` that cannot be read."""


class UnknownNameError(TokenpruneError, LookupError):
    """A name that no installed plugin offers."""


class MissingSignalError(TokenpruneError, LookupError):
    """A strategy reads a signal that nobody supplied."""


class UnsupportedError(TokenpruneError, NotImplementedError):
    """The model, tower, cache or option is one that an adapter cannot serve."""


class AttachError(TokenpruneError, RuntimeError):
    """Attaching, detaching or running an attached model went wrong."""


class PluginError(TokenpruneError, RuntimeError):
    """Plugins that conflict, misspell a hook or offer the wrong record."""


class MissingExtraError(TokenpruneError, ImportError):
    """A library that an optional extra brings cannot be imported."""
