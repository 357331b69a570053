"""Hooks: handles that undo what was installed, and state that a copied model must not share."""

from __future__ import annotations

from typing import NoReturn, Protocol

from .errors import AttachError


class Removable(Protocol):
    """A handle of something installed, such as torch's hooks return."""

    def remove(self) -> None:
        """Undo it."""


class NotCopyable:
    """State that hooks hold. A copied or pickled model would share it, so that is refused."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise AttachError("detach before copying a model: its hooks would serve the original")

    def __reduce__(self) -> NoReturn:
        raise AttachError(
            "detach before pickling a model; ship the spec instead and attach where it is loaded"
        )
