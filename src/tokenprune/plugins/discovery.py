"""Discovery of plugins: entry points and what comes along are loaded, broken ones skipped."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

import pluggy

from ..errors import PluginError
from .hookspec import HOOKS, INTERFACE, OLDEST_INTERFACE, PROJECT, TokenpruneSpecs
from .offers import CORE, Offer, Registry
from .types import Plugin


def build_registry(entries: Iterable[EntryPoint], built_in: Mapping[str, object]) -> Registry:
    """Load plugins; a broken one is named in a warning, remembered, and skipped.

    Args:
        entries: entry points of the group ``tokenprune``.
        built_in: plugins that come with the package, by the distribution that they are said to
            come from; they go through the same door.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(TokenpruneSpecs)
    registry = Registry()
    for name, plugin in built_in.items():
        _collect(manager, registry, plugin, name)
    # Our own first, whatever the order on disk: nobody may take their names.
    for entry in sorted(entries, key=lambda each: _origin(each) != CORE):
        origin = _origin(entry)
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


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _collect(
    manager: pluggy.PluginManager, registry: Registry, plugin: object, origin: str
) -> None:
    """Add what one plugin offers: all of it, or on any error none of it."""
    _check_interface(plugin, origin)
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
        _check_names(registry, found, origin)
    except Exception:
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        raise
    for kind, offers in found.items():
        getattr(registry, kind).extend(offers)


def _check_interface(plugin: object, origin: str) -> None:
    """Refuse a plugin of an interface that is not ours."""
    version = getattr(plugin, "tokenprune_interface", 1)
    if isinstance(version, bool) or not isinstance(version, int):
        raise PluginError(f"tokenprune_interface must be an int such as 1, got {version!r}")
    if version > INTERFACE:
        raise PluginError(
            f"written for version {version} of the plugin interface, and this {CORE} has "
            f"version {INTERFACE}: upgrade {CORE}"
        )
    if version < OLDEST_INTERFACE:
        raise PluginError(
            f"written for version {version} of the plugin interface, and this {CORE} takes "
            f"{OLDEST_INTERFACE} to {INTERFACE}: upgrade {origin}, or install an older {CORE}"
        )


def _check_names(registry: Registry, found: dict[str, list[Offer[Plugin]]], origin: str) -> None:
    """Refuse names that tokenprune itself uses, and one name for two things of a kind."""
    for offers in found.values():
        for offer in offers:
            name = offer.plugin.name
            if origin != CORE and CORE in registry.holders(name):
                raise PluginError(
                    f"{name!r} is the name of a {registry.holders(name)[CORE]} of tokenprune "
                    f"itself; give yours another, such as 'my-{name}'"
                )
    mine: dict[str, list[str]] = {}
    for kind, offers in found.items():
        earlier = [each for each in getattr(registry, kind) if each.origin == origin]
        mine[kind] = [each.plugin.name for each in (*earlier, *offers)]
    # A spec cannot tell a scorer from a reducer of its name; a recipe may be called as they are.
    mine["scorers"] += mine.pop("reducers")
    for names in mine.values():
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PluginError(f"it offers two things called {', '.join(map(repr, twice))}")


@lru_cache(maxsize=1)
def registry() -> Registry:
    """What is installed, found once per process; `registry.cache_clear()` looks again."""
    from .. import builtin

    return build_registry(entry_points(group=PROJECT), {CORE: builtin})
