"""What can go wrong when the pocket model is loaded."""

from __future__ import annotations

from tokenprune.errors import TokenpruneError


class MissingExtraError(TokenpruneError, ImportError):
    """A package that an optional extra brings is not installed."""


class MissingWeightsError(TokenpruneError, FileNotFoundError):
    """The folder holds no checkpoint."""
