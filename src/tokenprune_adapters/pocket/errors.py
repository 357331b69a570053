"""Error of the pocket model: its weights are missing."""

from __future__ import annotations

from tokenprune.errors import TokenpruneError


class MissingWeightsError(TokenpruneError, FileNotFoundError):
    """The folder holds no checkpoint."""
