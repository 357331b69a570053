"""Checks when attaching: the version of transformers, and the arguments that its modules take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedError
from tokenprune.placement import AfterLayer, Placement
from tokenprune.versions import library

from .anatomy import RECURRENT, Anatomy, has_states, odd_layers
from .family import Family
from .names import Argument, Call, Signature

_RANKING = (Call.cache, Call.encoded, Call.kept_logits)
_CORE = (Call.ids, Call.embeds, Call.mask, Call.positions, Call.cache, Call.encoded)
_LLM = (Call.embeds, Call.mask, Call.positions, Call.cache)
_LAYER = (Call.hidden, Call.mask, Call.positions, Call.rotary)
_TOWER = (Call.pixels,)

VERSION = library("transformers").release
"""Release of transformers that is installed, major and minor."""


def check_transformers() -> None:
    """Refuse releases of transformers that are older than those tested."""
    transformers = library("transformers")
    if transformers.is_older:
        raise UnsupportedError(
            f"transformers {transformers.found} is not supported; install "
            f"'{transformers.requirement}'"
        )


def check_family(family: Family, parts: Anatomy, placement: Placement) -> None:
    """Refuse a model of `family` whose modules do not take what the hooks pass and read."""
    check_transformers()
    if family.oldest > VERSION:
        raise UnsupportedError(
            f"{family.name} needs transformers {'.'.join(map(str, family.oldest))} or newer, found "
            f"{library('transformers').found}: older ones hand over other features, or have faults "
            "of their own"
        )
    # The core gets what it gives to the methods, and is read as well.
    given = [argument for sight in family.sights for argument in (sight.pixels, *sight.needs)]
    _check(parts.core, (*_CORE, *given))
    check_llm(parts.llm, layers=isinstance(placement, AfterLayer))
    # A call may ask for other layers than those that are configured, which is refused.
    layer = (Call.feature_layer,) if parts.projector else ()
    for tower in parts.towers if parts.projector else ():
        _check(tower, _TOWER)
    for sight in family.sights:
        check_method(parts, sight.encode, sight.pixels, *sight.needs, *layer)
    for name, wanted in family.methods:
        check_method(parts, name, *wanted)


def check_method(parts: Anatomy, name: str, *wanted: Argument[Any]) -> None:
    """Refuse a core without the method `name`, or one that does not take what is wanted."""
    method = getattr(parts.core, name, None)
    if method is None:
        raise UnsupportedError(f"{type(parts.core).__name__} has no {name}{_versions()}")
    _check(method, wanted)


def check_ranking(model: nn.Module) -> None:
    """Refuse a whole model that does not say which slot its prompt ends at."""
    _check(model, _RANKING)


def check_llm(llm: nn.Module, layers: bool = True) -> None:
    """Refuse a language model that cannot be shortened from outside.

    Args:
        llm: the language model.
        layers: whether its decoder layers get other arguments, too.
    """
    _check(llm, _LLM)
    odd = odd_layers(llm)
    if odd:
        raise UnsupportedError(
            f"{type(llm).__name__} has {odd} layers; only full attention is supported, since "
            "windows would count kept tokens only (and linear attention, before the LLM)"
        )
    if layers:
        if has_states(llm):
            raise UnsupportedError(
                f"{type(llm).__name__} has {RECURRENT} layers, whose states run along the prompt, "
                "so nothing can be left out after a layer, nor be watched; reduce before the LLM"
            )
        found: Any = llm.layers
        for kind in {type(layer): layer for layer in found}.values():
            _check(kind, _LAYER)
        _check_rotary(llm)


def _check_rotary(llm: nn.Module) -> None:
    """Refuse what makes no rotary embedding from positions alone."""
    rotary = getattr(llm, "rotary_emb", None)
    if rotary is None:
        raise UnsupportedError(f"{type(llm).__name__} has no rotary_emb for kept tokens")
    more = Signature.of(rotary).required[2:]
    if more:
        raise UnsupportedError(
            f"{type(rotary).__name__} of {type(llm).__name__} wants {', '.join(more)} beside "
            "states and positions: kinds of layers with embeddings of their own are not supported "
            "after a layer; reduce before the LLM"
        )


def _check(called: nn.Module | Callable[..., Any], wanted: Iterable[Argument[Any]]) -> None:
    signature = Signature.of(called)
    if not signature.names:
        raise UnsupportedError(
            f"{signature.what} wraps another module or function behind *args and **kwargs, so what "
            "arrives cannot be told; attach first and wrap it then, or use `module.compile()` in "
            "place of `torch.compile(module)`"
        )
    missing = signature.missing(*wanted)
    if missing:
        raise UnsupportedError(f"{signature.what} does not take {', '.join(missing)}{_versions()}")


def _versions() -> str:
    known = library("transformers")
    return (
        f"; found transformers {known.found}, tested {known.span}: install "
        f"'{known.requirement}', and see `tokenprune doctor`"
    )
