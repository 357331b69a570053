"""Registry of plugins: finds them, names the broken ones, and answers who offers what."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

import pluggy

from ..errors import PluginError, UnknownNameError, UnsupportedError
from .hookspec import HOOKS, PROJECT, TokenpruneSpecs
from .types import ModelPlugin, Plugin, RecipePlugin, ReducerPlugin, ScorerPlugin, TowerPlugin

P = TypeVar("P", bound=Plugin)
A = TypeVar("A", TowerPlugin, ModelPlugin)


@dataclass(frozen=True)
class Offer(Generic[P]):
    """A record and the distribution that offers it."""

    plugin: P
    origin: str


@dataclass(frozen=True)
class Registry:
    """Registry of all that the installed plugins offer.

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

    def names(self, offers: Sequence[Offer[P]]) -> list[str]:
        """Names of what is offered, in alphabetical order."""
        return sorted(offer.plugin.name for offer in offers)

    def named(self, offers: list[Offer[P]], name: str, kind: str) -> P | None:
        """The record called `name`, or None.

        Raises:
            PluginError: two plugins offer the name, or the plugin of that name is broken.
        """
        found = [offer for offer in offers if offer.plugin.name == name]
        if len(found) > 1:
            raise PluginError(
                f"two plugins offer a {kind} called {name!r}: "
                + " and ".join(offer.origin for offer in found)
                + "; uninstall one, or use its class instead of its name"
            )
        if not found and name in self.broken:
            raise PluginError(f"plugin {name!r} is broken: {self.broken[name]}") from self.broken[
                name
            ]
        return found[0].plugin if found else None

    def claiming(self, offers: list[Offer[A]], target: object, adapter: str | None) -> A:
        """The adapter for `target`: the one called `adapter`, else the nearest by class.

        Raises:
            UnknownNameError: no adapter is called `adapter`.
            UnsupportedError: no adapter claims the class of `target`.
            PluginError: two adapters claim the same class.
        """
        kind = "tower" if offers is self.towers else "model"
        if adapter is not None:
            named = self.named(offers, adapter, f"{kind} adapter")
            if named is None:
                raise UnknownNameError(
                    f"no {kind} adapter is called {adapter!r}; known: "
                    + ", ".join(self.names(offers))
                )
            return named
        for cls in type(target).__mro__:
            full_name = f"{cls.__module__}.{cls.__qualname__}"
            found = [offer for offer in offers if full_name in offer.plugin.claims]
            if len(found) > 1:
                raise PluginError(
                    f"two adapters claim {full_name}: "
                    + " and ".join(f"{o.plugin.name!r} of {o.origin}" for o in found)
                    + f"; choose one: attach(..., adapter={found[0].plugin.name!r})"
                )
            if found:
                return found[0].plugin
        supported = sorted({claim.rpartition(".")[2] for o in offers for claim in o.plugin.claims})
        hint = f"; broken plugins: {', '.join(self.broken)}" if self.broken else ""
        if any(cls.__name__ == "ScriptModule" for cls in type(target).__mro__):
            hint += "; scripted models run without hooks, so take the model as it was before"
        raise UnsupportedError(
            f"no adapter supports {type(target).__name__} as a {kind}; supported: "
            + (", ".join(supported) or "none (install tokenprune-vlm[hf])")
            + hint
        )


def build_registry(entries: Iterable[EntryPoint], built_in: Mapping[str, object]) -> Registry:
    """Load plugins; a broken one is named in a warning, remembered, and skipped.

    Args:
        entries: entry points of the group ``tokenprune``.
        built_in: plugins that come with the package, by name; they go through the same door.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(TokenpruneSpecs)
    registry = Registry()
    for name, plugin in built_in.items():
        _collect(manager, registry, plugin, name)
    for entry in entries:
        origin = entry.dist.name if entry.dist is not None else entry.value
        try:
            _collect(manager, registry, entry.load(), origin)
        except Exception as error:  # a third party's fault must not break everyone else
            registry.broken[entry.name] = registry.broken[origin] = error
            warnings.warn(
                f"tokenprune skips the plugin {entry.name!r} of {origin!r}: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
    return registry


def _collect(
    manager: pluggy.PluginManager, registry: Registry, plugin: object, origin: str
) -> None:
    """Add what one plugin offers: all of it, or on any error none of it."""
    if manager.is_registered(plugin):
        raise PluginError("another entry point offers the same object")
    others = set(manager.get_plugins())
    try:
        # A name of our own, since two packages may both call their class `Plugin`. Inside the
        # `try`, since pluggy < 1.7 keeps the hooks that it read before it met a faulty one.
        manager.register(plugin, f"{origin}#{len(others)}")
        try:
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                f"{error}; the hooks are tokenprune_{', tokenprune_'.join(HOOKS)}"
            ) from error
        found: dict[str, list[Offer[Plugin]]] = {}
        for kind, record in HOOKS.items():
            caller = manager.subset_hook_caller(f"tokenprune_{kind}", others)
            offered = [each for result in caller() for each in result]
            wrong = [each for each in offered if not isinstance(each, record)]
            if wrong:
                raise PluginError(
                    f"tokenprune_{kind} must yield {record.__name__}, got {wrong[0]!r}"
                )
            found[kind] = [Offer(each, origin) for each in offered]
    except Exception:
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        raise
    for kind, offers in found.items():
        getattr(registry, kind).extend(offers)


@lru_cache(maxsize=1)
def registry() -> Registry:
    """What is installed, found once per process; `registry.cache_clear()` looks again."""
    from .. import builtin

    return build_registry(entry_points(group=PROJECT), {"tokenprune": builtin})
