"""Offers of plugins, the broken ones among them, and who offers what: a `Registry`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..errors import PluginError, UnknownNameError, UnsupportedError
from .hookspec import HOOKS
from .types import ModelPlugin, Plugin, RecipePlugin, ReducerPlugin, ScorerPlugin, TowerPlugin

P = TypeVar("P", bound=Plugin, covariant=True)
A = TypeVar("A", TowerPlugin, ModelPlugin)

CORE = "tokenprune-vlm"
"""Distribution whose names nobody else may take."""


@dataclass(frozen=True)
class Offer(Generic[P]):
    """A record and the distribution that offers it."""

    plugin: P
    origin: str


@dataclass(frozen=True)
class Registry:
    """Registry of all that the installed plugins offer.

    A name belongs to one distribution, whatever kinds of things it gives that name: a recipe may
    be called like the reducer that it uses, but not like somebody else's.

    Attributes:
        scorers, reducers, towers, models, recipes: offers in the order of registration.
        broken: plugins that could not be loaded: name or distribution -> the error.
    """

    scorers: list[Offer[ScorerPlugin]] = field(default_factory=list)
    reducers: list[Offer[ReducerPlugin]] = field(default_factory=list)
    towers: list[Offer[TowerPlugin]] = field(default_factory=list)
    models: list[Offer[ModelPlugin]] = field(default_factory=list)
    recipes: list[Offer[RecipePlugin]] = field(default_factory=list)
    broken: dict[str, Exception] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Offer[Plugin]]]:
        """Every offer with its kind, such as "scorer"."""
        for kind in HOOKS:
            for offer in getattr(self, kind):
                yield kind.removesuffix("s"), offer

    def names(self, offers: Sequence[Offer[Plugin]]) -> list[str]:
        """Names of what is offered, in alphabetical order."""
        return sorted(offer.plugin.name for offer in offers)

    def holders(self, name: str) -> dict[str, str]:
        """Distributions that use `name`, each with the kinds that it gives the name to.

        More than one of them is a clash: then nobody's can be used by name.
        """
        kinds: dict[str, list[str]] = {}
        for kind, offer in self:
            if offer.plugin.name == name:
                kinds.setdefault(offer.origin, []).append(kind)
        return {origin: " and ".join(each) for origin, each in kinds.items()}

    @property
    def broken_hint(self) -> str:
        """Names of the broken plugins as the end of a message; empty where there are none."""
        return f"; broken plugins: {', '.join(self.broken)}" if self.broken else ""

    def named(self, offers: list[Offer[P]], name: str, kind: str) -> P | None:
        """The record called `name`, or None.

        Args:
            offers: those of one kind.
            name: what is looked for.
            kind: of `offers`, for messages.

        Raises:
            PluginError: two distributions use the name, for whatever kind, or the plugin of that
                name is broken.
        """
        found = [offer.plugin for offer in offers if offer.plugin.name == name]
        holders = self.holders(name)
        if len(holders) > 1:
            raise PluginError(
                f"{name!r} is a name of two plugins: "
                + " and ".join(f"a {kinds} of {origin}" for origin, kinds in holders.items())
                + f"; uninstall one, or use the class instead of the name of the {kind}"
            )
        if not found and name in self.broken:
            error = self.broken[name]
            raise PluginError(f"plugin {name!r} is broken: {error}") from error
        return found[0] if found else None

    def claiming(self, offers: list[Offer[A]], target: object, adapter: str | None) -> A:
        """The adapter for `target`: the one called `adapter`, else the nearest by class.

        Raises:
            UnknownNameError: no adapter is called `adapter`.
            UnsupportedError: no adapter claims the class of `target`, or `adapter` does not.
            PluginError: two adapters claim the same class.
        """
        kind = "tower" if offers is self.towers else "model"
        if adapter is not None:
            return self._asked_for(offers, target, adapter, kind)
        full_name, found = _nearest(offers, target)
        if len(found) > 1:
            raise PluginError(
                f"two adapters claim {full_name}: "
                + " and ".join(f"{o.plugin.name!r} of {o.origin}" for o in found)
                + f"; choose one: attach(..., adapter={found[0].plugin.name!r})"
            )
        if found:
            return found[0].plugin
        raise UnsupportedError(
            f"no adapter supports {_full(target)} as a {kind}{_instead(offers, target)}; "
            f"supported: {_by_library(offers) or 'none (install tokenprune-vlm[hf])'}"
            f"{self.broken_hint}. `tokenprune list --models` says what can be done to each; "
            "'Use another model' in the documentation how to serve others; and strategies work on "
            "tensors, without any adapter"
        )

    def _asked_for(self, offers: list[Offer[A]], target: object, adapter: str, kind: str) -> A:
        named = self.named(offers, adapter, f"{kind} adapter")
        if named is None:
            raise UnknownNameError(
                f"no {kind} adapter is called {adapter!r}; known: "
                + ", ".join(self.names(offers))
                + self.broken_hint
            )
        if named.claims and not any(name in named.claims for name in _full_names(target)):
            _, fitting = _nearest(offers, target)
            instead = " or ".join(f"adapter={offer.plugin.name!r}" for offer in fitting)
            raise UnsupportedError(
                f"adapter {adapter!r} is for {', '.join(map(_last, named.claims))}, not for "
                f"{type(target).__name__}; "
                + (f"what fits is {instead}" if fitting else "no adapter claims that class")
            )
        return named


def _full(target: object) -> str:
    name = next(iter(_full_names(target)))
    return name.removeprefix("builtins.")


def _instead(offers: list[Offer[A]], target: object) -> str:
    """What to attach instead, where that can be said."""
    names = [cls.__name__ for cls in type(target).__mro__]
    if "ScriptModule" in names:
        return "; scripted models run without hooks, so take the model as it was before"
    module = type(target).__module__
    heads = [
        _last(claim) for o in offers for claim in o.plugin.claims if claim.startswith(f"{module}.")
    ]
    return f"; take the whole model, {' or '.join(heads)}" if heads else ""


def _by_library(offers: list[Offer[A]]) -> str:
    """Classes that are claimed, by the library that they come from."""
    found: dict[str, set[str]] = {}
    for offer in offers:
        for claim in offer.plugin.claims:
            found.setdefault(claim.partition(".")[0], set()).add(_last(claim))
    return "; ".join(f"of {library} {', '.join(sorted(each))}" for library, each in found.items())


def _full_names(target: object) -> Iterable[str]:
    return (f"{cls.__module__}.{cls.__qualname__}" for cls in type(target).__mro__)


def _nearest(offers: list[Offer[A]], target: object) -> tuple[str, list[Offer[A]]]:
    """The nearest class of `target` that is claimed, and by whom."""
    for full_name in _full_names(target):
        found = [offer for offer in offers if full_name in offer.plugin.claims]
        if found:
            return full_name, found
    return "", []


def _last(claim: str) -> str:
    return claim.rpartition(".")[2]
