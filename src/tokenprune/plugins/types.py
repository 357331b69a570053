"""Records that plugins hand over. Frozen, and nothing heavy is imported to make one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import PluginError

if TYPE_CHECKING:
    from ..adapter import ModelAdapter, TowerAdapter
    from ..strategy import Reducer, Scorer
    from ..trial import Trial

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Plugin:
    """Record: what all plugins share.

    Attributes:
        name: kebab-case; what users write in specs.
        summary: one line, for `tokenprune list` and the docs.
    """

    name: str
    summary: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _KEBAB.fullmatch(self.name):
            raise PluginError(
                f"a plugin's name must be kebab-case like 'my-idea', got {self.name!r}"
            )
        if not self.summary or "\n" in self.summary:
            raise PluginError(f"plugin {self.name!r} needs a summary of one line")


@dataclass(frozen=True)
class ScorerPlugin(Plugin):
    """Offers a scorer: `factory` is its frozen dataclass, `paper` says where it comes from."""

    factory: type[Scorer]
    paper: str = ""


@dataclass(frozen=True)
class ReducerPlugin(Plugin):
    """Offers a reducer: `factory` is its frozen dataclass, `paper` says where it comes from."""

    factory: type[Reducer]
    paper: str = ""


@dataclass(frozen=True)
class TowerPlugin(Plugin):
    """Offers an adapter for vision towers.

    Attributes:
        factory: function that makes the adapter; may import what it needs.
        claims: full names of classes, matched against the MRO of a tower, nearest class first.
    """

    factory: Callable[[], TowerAdapter]
    claims: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_claims(self)


@dataclass(frozen=True)
class ModelPlugin(Plugin):
    """Offers an adapter for whole models.

    Attributes:
        factory: function that makes the adapter; may import what it needs.
        claims: full names of classes, matched against the MRO of a model, nearest class first.
        trials: function that makes tiny models for `tokenprune doctor`; must import no model
            library itself. All of them can question any model that is claimed.
        facts: function that gives what models of the classes can do, by heading, for
            ``tokenprune list --models``: such as placements, signals, versions.
    """

    factory: Callable[[], ModelAdapter]
    claims: tuple[str, ...]
    trials: Callable[[], Iterable[Trial]] | None = None
    facts: Callable[[], Mapping[str, str]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_claims(self)


@dataclass(frozen=True)
class RecipePlugin(Plugin):
    """A paper's method as data: a name that expands to a spec in plain sight.

    Attributes:
        template: the spec, with the arguments in braces: ``"random | evict({keep}) @ before-llm"``.
        defaults: the arguments and the paper's values for them.
        paper: reference.
        differs: where we knowingly differ from the released code, and why.
    """

    template: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    paper: str = ""
    differs: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))
        try:
            self.expand()
        except (KeyError, IndexError, ValueError) as error:
            raise PluginError(
                f"recipe {self.name!r} has no default for a field of its template "
                f"{self.template!r}: {error}"
            ) from None

    def expand(self, *values: object, **named: object) -> str:
        """The spec for these arguments, in the order of `defaults` or by name."""
        arguments = dict(self.defaults)
        arguments.update(zip(arguments, values, strict=False))
        arguments.update(named)
        return self.template.format_map({name: repr(value) for name, value in arguments.items()})


def _check_claims(plugin: TowerPlugin | ModelPlugin) -> None:
    # A lone string would claim every class whose name is a part of it.
    if isinstance(plugin.claims, str) or not all(isinstance(name, str) for name in plugin.claims):
        raise PluginError(
            f"plugin {plugin.name!r} must claim a tuple of full class names, got {plugin.claims!r}"
        )
