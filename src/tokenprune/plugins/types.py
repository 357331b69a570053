"""Records that plugins hand over. Frozen, checked when made; nothing heavy is imported for one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from string import Formatter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import PluginError, SpecError
from ..grammar import stage_texts

if TYPE_CHECKING:
    from ..adapter import ModelAdapter, TowerAdapter
    from ..strategy import Reducer, Scorer
    from ..trial import Trial

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_FULL_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


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
        if not isinstance(self.summary, str) or not self.summary or "\n" in self.summary:
            raise PluginError(
                f"plugin {self.name!r} needs a summary of one line, got {self.summary!r}"
            )


@dataclass(frozen=True)
class ScorerPlugin(Plugin):
    """Offers a scorer: `factory` is its frozen dataclass, `paper` says where it comes from."""

    factory: type[Scorer]
    paper: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        from ..strategy import Scorer

        _check_step(self, self.factory, Scorer)


@dataclass(frozen=True)
class ReducerPlugin(Plugin):
    """Offers a reducer: `factory` is its frozen dataclass, `paper` says where it comes from."""

    factory: type[Reducer]
    paper: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        from ..strategy import Reducer

        _check_step(self, self.factory, Reducer)


@dataclass(frozen=True)
class TowerPlugin(Plugin):
    """Offers an adapter for vision towers.

    Attributes:
        factory: function that makes the adapter; may import what it needs.
        claims: full names of classes, matched against the MRO of a tower, nearest class first;
            none for an adapter that is only ever asked for by its name.
    """

    factory: Callable[[], TowerAdapter]
    claims: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_adapter(self)

    def adapter(self) -> TowerAdapter:
        """The adapter, made anew.

        Raises:
            PluginError: `factory` gives something else.
        """
        from ..adapter import TowerAdapter

        made = self.factory()
        _check_made(self, made, TowerAdapter)
        return made


@dataclass(frozen=True)
class ModelPlugin(Plugin):
    """Offers an adapter for whole models.

    Attributes:
        factory: function that makes the adapter; may import what it needs.
        claims: full names of classes, matched against the MRO of a model, nearest class first;
            none for an adapter that is only ever asked for by its name.
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
        _check_adapter(self)
        for name in ("trials", "facts"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise PluginError(
                    f"{name} of plugin {self.name!r} must be a function that takes nothing, got "
                    f"{getattr(self, name)!r}"
                )

    def adapter(self) -> ModelAdapter:
        """The adapter, made anew.

        Raises:
            PluginError: `factory` gives something else.
        """
        from ..adapter import ModelAdapter

        made = self.factory()
        _check_made(self, made, ModelAdapter)
        return made


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
        if not isinstance(self.template, str) or not isinstance(self.defaults, Mapping):
            raise PluginError(
                f"recipe {self.name!r} needs a template (str) and defaults (a mapping), got "
                f"{self.template!r} and {self.defaults!r}"
            )
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))
        try:
            fields = {name for _, name, _, _ in Formatter().parse(self.template) if name}
            spec = self.expand()
        except (KeyError, IndexError, ValueError) as error:
            raise PluginError(
                f"recipe {self.name!r} has no default for a field of its template "
                f"{self.template!r}: {error}"
            ) from None
        idle = [name for name in self.defaults if name not in fields]
        if idle:
            raise PluginError(
                f"recipe {self.name!r} has a default for {', '.join(map(repr, idle))}, which its "
                f"template {self.template!r} does not use: whoever gives it would change nothing"
            )
        try:
            stage_texts(spec)
        except SpecError as error:
            raise PluginError(f"recipe {self.name!r} is no spec: {error}") from None

    def expand(self, *values: object, **named: object) -> str:
        """The spec for these arguments, in the order of `defaults` or by name."""
        arguments = dict(self.defaults)
        arguments.update(zip(arguments, values, strict=False))
        arguments.update(named)
        return self.template.format_map({name: repr(value) for name, value in arguments.items()})


def _check_step(plugin: Plugin, factory: Any, base: type) -> None:
    kind = base.__name__.lower()
    if not (isinstance(factory, type) and issubclass(factory, base)):
        raise PluginError(
            f"plugin {plugin.name!r} must offer the class of a {kind}, a subclass of "
            f"tokenprune.{base.__name__}, got {factory!r}"
        )
    missing = ", ".join(sorted(getattr(factory, "__abstractmethods__", ())))
    if missing:
        raise PluginError(f"{factory.__name__} of plugin {plugin.name!r} does not define {missing}")
    settings: Any = getattr(factory, "__dataclass_params__", None)
    if not is_dataclass(factory) or not settings.frozen or not settings.eq:
        raise PluginError(
            f"{factory.__name__} of plugin {plugin.name!r} must be a frozen dataclass, whose "
            "fields are its arguments in a spec: put @dataclass(frozen=True) above it"
        )
    own = {
        name
        for name, hint in inspect.get_annotations(factory).items()
        if "ClassVar" not in str(hint)
    }
    if own and "__dataclass_fields__" not in vars(factory):
        raise PluginError(
            f"{factory.__name__} of plugin {plugin.name!r} annotates {', '.join(sorted(own))}, but "
            "is no dataclass of its own, so that they are no arguments: put "
            "@dataclass(frozen=True) above it"
        )


def _check_adapter(plugin: TowerPlugin | ModelPlugin) -> None:
    if not callable(plugin.factory):
        raise PluginError(
            f"the factory of plugin {plugin.name!r} must be a function (or class) that takes "
            f"nothing and gives an adapter, got {plugin.factory!r}"
        )
    # A lone string would claim every class whose name is a part of it.
    claims = plugin.claims
    if isinstance(claims, str) or not all(
        isinstance(name, str) and _FULL_NAME.fullmatch(name) for name in claims
    ):
        raise PluginError(
            f"plugin {plugin.name!r} must claim a tuple of full class names, such as "
            f"'package.module.Class', got {claims!r}"
        )


def _check_made(plugin: Plugin, made: object, kind: type) -> None:
    if not isinstance(made, kind):
        raise PluginError(
            f"the factory of plugin {plugin.name!r} must give an instance of "
            f"tokenprune.{kind.__name__}, got {made!r}"
        )
