"""Errors of batch work."""

from __future__ import annotations

from ..errors import TokenpruneError


class PictureError(TokenpruneError, ValueError):
    """A row whose picture or prompt cannot be used; it is reported in the row."""


class InputError(TokenpruneError, ValueError):
    """Rows that cannot be read, or told from each other."""


class ResumeError(TokenpruneError, RuntimeError):
    """The output belongs to other work, or to somebody who is writing it."""


class WorkerError(TokenpruneError, RuntimeError):
    """A process or cluster that cannot do the work."""
