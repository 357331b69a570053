"""What a plugin yields for a family, and what `tokenprune list --models` tells of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from tokenprune.adapter import ModelAdapter
from tokenprune.plugins import ModelPlugin
from tokenprune.trial import Trial

from .family import Family


def family_plugin(
    family: Family, trials: Callable[[], Iterable[Trial]] | None = None
) -> ModelPlugin:
    """What `tokenprune_models` yields for a family.

    Args:
        family: the family.
        trials: function that gives tiny models for `tokenprune doctor`.
    """
    made, told = partial(_adapter, family), partial(facts_of, family)
    return ModelPlugin(family.name, family.summary, made, family.classes, trials, told)


def facts_of(family: Family) -> dict[str, str]:
    """What models of a family can do, by heading."""
    from .tower_attention import given_by

    signals = ", ".join(sorted(each.__name__ for each in given_by(family.tower))) or "none"
    where = "before-llm" if family.states else "before-llm, after-layer"
    if family.projector:
        signals = "those that the adapter of its tower gives"
        where = "before-llm (before the projector), after-layer"
    budgets = ["picture"]
    if family.tiles:
        budgets.append("tile (per='crop')")
    if "image" in family.divided:
        budgets.append("tile before the LLM (per='crop')")
    if any(sight.kind == "video" for sight in family.sights):
        budgets += ["video", "frame (per='frame')"]
    since = ".".join(map(str, family.oldest)) + " or newer" if any(family.oldest) else "all"
    return {
        "takes": " and ".join(f"{sight.kind}s" for sight in family.sights),
        "placements": where,
        "positions before the LLM": family.positions,
        "signals of the tower": signals,
        "budgets are for a": ", ".join(budgets),
        "transformers": since,
    }


def _adapter(family: Family) -> ModelAdapter:
    from .family_adapter import FamilyAdapter

    return FamilyAdapter(family)
