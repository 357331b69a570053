"""`Fault`: something wrong, and the list of all."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenprune import (
    ModelPlugin,
    TowerPlugin,
)
from tokenprune.testing import ModelCase, ReducerCase, ScorerCase, TowerCase


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Attributes:
        number: the promise that it breaks.
        subject: what to check.
        says: a part of the message by which the check names the fault.
        plugin: the record under which `subject` finds its adapter.
    """

    number: str
    subject: ScorerCase | ReducerCase | TowerCase | ModelCase
    says: str
    plugin: TowerPlugin | ModelPlugin | None = None
    name: str = field(default="")


FAULTS: list[Fault] = []
