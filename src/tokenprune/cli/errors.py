"""Error of the command line: what was typed cannot be used."""

from __future__ import annotations

from ..errors import TokenpruneError


class CommandError(TokenpruneError, ValueError):
    """Something that was typed on the command line cannot be used."""
