"""Options of a request, `mm_processor_kwargs`: names that nobody reads are refused.

The processors of transformers ignore a name that they do not know, and so a misspelt budget would
be answered with the engine's own. Nothing of vLLM or transformers is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, get_type_hints

from torch import Tensor

from tokenprune.errors import TokenpruneError

from .settings import KEY

PARTS = frozenset({"self", "kwargs", "image_processor", "tokenizer"})
"""Parameters of a processor's constructor that are not options."""

OF_VLLM = frozenset({"use_audio_in_video"})
"""Names that vLLM reads of every request, whatever the model."""


class OptionError(TokenpruneError, ValueError):
    """An option of a request or an engine that would be ignored, or cannot be meant."""


class EngineError(TokenpruneError, RuntimeError):
    """Settings that an engine cannot start with. It is no `ValueError`: see `no_value_errors`."""


@contextmanager
def no_value_errors() -> Iterator[None]:
    """Make every `ValueError` inside an `EngineError`.

    Where vLLM asks whether a model takes pictures, it reads a `ValueError` as "no", and starts a
    server of the same model for text alone.
    """
    try:
        yield
    except ValueError as error:
        raise EngineError(str(error)) from error


@dataclass(frozen=True)
class Options:
    """Names that may stand in `mm_processor_kwargs`, beside the budget.

    Attributes:
        flat: names at the top.
        scopes: names inside of `images_kwargs` and its like.
    """

    flat: frozenset[str]
    scopes: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, processor: Any) -> Options:
        """Read them off a processor of transformers, which declares what it takes."""
        scopes = {
            name: frozenset(getattr(kinds, "__annotations__", ()))
            for name, kinds in get_type_hints(processor.valid_processor_kwargs).items()
        }
        pictures = frozenset(processor.image_processor.valid_kwargs.__annotations__)
        scopes["images_kwargs"] = scopes.get("images_kwargs", frozenset()) | pictures
        made_of = inspect.signature(type(processor).__init__).parameters.keys() - PARTS
        flat = OF_VLLM.union(made_of, scopes, *scopes.values())
        return cls(flat, {name: names for name, names in scopes.items() if names})

    def check(self, given: Mapping[str, object]) -> None:
        """Refuse what would be ignored.

        Args:
            given: `mm_processor_kwargs` of a request or of an engine.

        Raises:
            OptionError: a name that is unknown, a scope that is no mapping, a budget that is None.
        """
        where = "mm_processor_kwargs"
        _refuse(where, given.keys() - self.flat - {KEY}, self.flat | {KEY})
        if KEY in given and given[KEY] is None:
            raise OptionError(f"{where}[{KEY!r}] is null; leave it out for the engine's own budget")
        for scope, names in self.scopes.items():
            inside = given.get(scope, {})
            if not isinstance(inside, Mapping):
                raise OptionError(f"{where}[{scope!r}] must be a mapping, got {inside!r}")
            _refuse(f"{where}[{scope!r}]", inside.keys() - names, names)


def check_overrides(overrides: object) -> None:
    """Refuse names of an engine's `hf_overrides` that look like ours and are not.

    All others become attributes of the model's config, which may have any.

    Args:
        overrides: a mapping; vLLM also takes a function, of which nothing can be said.

    Raises:
        OptionError: a misspelt name, or a setting that stands one level too high.
    """
    if not isinstance(overrides, Mapping):
        return
    names = [name for name in overrides if isinstance(name, str) and name != KEY]
    wrong = [name for name in names if name in ("prune", "keep") or _like(name, [KEY])]
    if wrong:
        raise OptionError(
            f"hf_overrides has {_listed(wrong)}, which nobody reads; what to do with pictures is "
            f"written {{{KEY!r}: {{'prune': 'cls-attention | evict(128)'}}}}"
        )


def check_pixels(pixels: Iterable[Tensor], side: int) -> None:
    """Refuse pictures of a size that the tower does not take, which would end the engine.

    Args:
        pixels: `(channels, height, width)` of each picture, as a processor made them.
        side: height and width that the tower takes.

    Raises:
        OptionError: another size.
    """
    for each in pixels:
        height, width = each.shape[-2:]
        if (height, width) != (side, side):
            raise OptionError(
                f"these mm_processor_kwargs make pictures of {height}x{width} pixels, but the "
                f"vision tower takes {side}x{side}"
            )


def _refuse(where: str, unknown: Iterable[str], known: frozenset[str]) -> None:
    wrong = sorted(map(str, unknown))
    if not wrong:
        return
    near = sorted({match for name in wrong for match in _like(name, known)})
    raise OptionError(
        f"{where} has {_listed(wrong)}, which nobody reads"
        + (f" (did you mean {_listed(near)}?)" if near else "")
        + f"; a picture's budget is written {{{KEY!r}: {{'keep': count or fraction}}}}"
    )


def _like(name: str, known: Iterable[str]) -> list[str]:
    return get_close_matches(name.lower(), known, n=1, cutoff=0.75)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
