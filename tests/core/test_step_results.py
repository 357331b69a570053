"""What steps declare and return is looked at where it comes back, and the plugin is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from core.fakes import entry, installed_in, module_with, registry_of
from tokenprune import (
    BeforeLLM,
    ClsAttention,
    ClsAttentionScorer,
    Evict,
    Keys,
    MissingSignalError,
    Plan,
    RandomScorer,
    ReceivedAttention,
    ReceivedAttentionScorer,
    Reducer,
    ReducerPlugin,
    Scorer,
    ScorerPlugin,
    ShapeError,
    Signals,
    SpecError,
    Strategy,
    VisualTokens,
    spec_of,
)
from tokenprune.spec import parse

TWO = VisualTokens.of(torch.arange(8.0).reshape(2, 4, 1))


@dataclass(frozen=True)
class Answers(Scorer):
    """Returns whatever it is told to."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return GIVEN[0]  # type: ignore[return-value]


@dataclass(frozen=True)
class Decides(Reducer):
    """Returns whatever it is told to."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        return GIVEN[0]  # type: ignore[return-value]


GIVEN: list[Any] = [None]
KNOWN = registry_of(
    entry(
        "p", module_with(scorers=[ScorerPlugin("answers", "a text", Answers)]), dist="their-dist"
    ),
    entry(
        "q", module_with(reducers=[ReducerPlugin("decides", "a text", Decides)]), dist="its-dist"
    ),
)


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.plugins.registry", lambda: KNOWN)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "got None"),
        (numpy.zeros((2, 4), numpy.float32), "a numpy.ndarray"),
        ([[0.0] * 4] * 2, "a list"),
        (torch.ones(2, 4, dtype=torch.bool), "got torch.bool (2, 4)"),
        (torch.zeros(2, 4).double(), "got torch.float64 (2, 4)"),
        (torch.zeros(2, 4).half(), "got torch.float16 (2, 4)"),
        (torch.zeros(4), "got torch.float32 (4,)"),
        (torch.zeros(2, 4, 1), "got torch.float32 (2, 4, 1)"),
        (torch.zeros(1, 4), "got torch.float32 (1, 4)"),
        (torch.Tensor, "got the class Tensor instead of an instance"),
        (torch.zeros(2, 4, device="meta"), "must return scores on cpu, got meta"),
    ],
)
def test_scores_that_are_none(given: object, words: str) -> None:
    GIVEN[0] = given
    with pytest.raises(ShapeError) as caught:
        Strategy(Answers(), Evict(2))(TWO)
    assert "Answers ('answers' of their-dist) must return " in str(caught.value)
    assert words in str(caught.value)


WHOLE = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "must return a Plan, got None"),
        (WHOLE, "got torch.bool (2, 4); a mask of what stays becomes one by Plan.select(mask)"),
        (WHOLE.numpy(), "a numpy.ndarray"),
        (Plan, "got the class Plan instead of an instance"),
        (Plan.select(WHOLE[:1]), "for 2 rows of 4 slots, got one for 1 rows of 4"),
        (Plan.select(WHOLE[:, :3]), "for 2 rows of 4 slots, got one for 2 rows of 3"),
        (
            Plan(
                torch.zeros(2, 1, dtype=torch.int64, device="meta"),
                torch.ones(2, 1, dtype=torch.bool, device="meta"),
                4,
                lengths=(1, 1),
            ),
            "must return a plan on cpu, got one on meta",
        ),
    ],
)
def test_plans_that_are_none(given: object, words: str) -> None:
    GIVEN[0] = given
    with pytest.raises(ShapeError) as caught:
        Strategy(Decides())(TWO)
    assert "Decides ('decides' of its-dist) must return a" in str(caught.value).lower().replace(
        "decides (", "Decides ("
    )
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "declared",
    [frozenset({ClsAttention}), ClsAttention(1), None, {"cls-attention"}],
    ids=["class", "alone", "none", "text"],
)
def test_declared_signals_are_instances(declared: object) -> None:
    class Odd(RandomScorer):
        @property
        def signals(self) -> Any:
            return declared

    with pytest.raises(SpecError, match="Odd must declare instances of Signal, as in"):
        Strategy(Odd(), Evict(2))


# -------------------------------------------------------------- each step sees its own signals

ROWS = Signals(
    {ClsAttention(1): torch.rand(2, 1, 1, 4), ReceivedAttention(1): torch.rand(2, 1, 1, 4)}
)


@dataclass(frozen=True)
class Peeks(RandomScorer):
    """Reads what another step asked for."""

    layer: int = 1

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return signals[ClsAttention(self.layer)].mean((1, 2))


def test_a_step_cannot_read_what_another_one_declared() -> None:
    strategy = Strategy(ClsAttentionScorer(1), Evict(3), Peeks(), Evict(2))
    with pytest.raises(MissingSignalError) as caught:
        strategy(TWO, ROWS)
    assert str(caught.value) == (
        "ClsAttention(layers=1) is another step's: a step sees the signals that its property "
        "`signals` names, here none"
    )
    with pytest.raises(MissingSignalError, match=r"was not supplied; supplied: ClsAttention"):
        Strategy(Peeks(layer=2), Evict(2))(TWO, ROWS)


def test_a_step_sees_nobody_elses_signals() -> None:
    seen: list[Signals] = []

    class Looks(ReceivedAttentionScorer):
        def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
            seen.append(signals)
            return super().score(tokens, signals)

    Strategy(ClsAttentionScorer(1), Evict(3), Looks(1), Evict(2))(TWO, ROWS)
    assert [set(each) for each in seen] == [{ReceivedAttention(1)}]
    assert seen[0][ReceivedAttention(1)].shape == (2, 1, 1, 3)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({ClsAttention(2): torch.rand(2, 1, 1, 4)}, "asks for 2 layers, got 1"),
        ({ClsAttention((-1, 3)): torch.rand(2, 3, 1, 4)}, "asks for 2 layers, got 3"),
        (
            {ClsAttention(1): torch.rand(2, 1, 1, 4), Keys(-1): torch.rand(1, 1, 4, 5)},
            "signals of one call describe the same visual tokens",
        ),
        (
            {ClsAttention(1): torch.rand(2, 1, 1, 4), Keys(-1): torch.rand(2, 1, 5, 5)},
            "signals of one call describe the same visual tokens",
        ),
        ({ClsAttention(1): [[1.0]]}, "must be a tensor with axes (batch layers heads tokens)"),
    ],
)
def test_signals_disagree(answers: Any, words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        Signals(answers)
    assert words in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 1, 1, 1), (2, 1, 1, 5)])
def test_signals_of_other_tokens_are_refused(shape: tuple[int, ...]) -> None:
    """A row of one, or one token, would broadcast."""
    with pytest.raises(ShapeError, match=r"ClsAttention\(layers=1\) has \d along"):
        Strategy(ClsAttentionScorer(1), Evict(2))(
            TWO, Signals({ClsAttention(1): torch.rand(shape)})
        )


# ------------------------------------------------------------------------- arguments of specs


@dataclass(frozen=True)
class Typed(Scorer):
    """Fields of every type that a spec can say, checked by nobody."""

    strength: float = 1.0
    rows: tuple[int, ...] = ()
    name: str | None = None
    strict: bool = False
    loose: float = None  # type: ignore[assignment]

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.zeros(tokens.mask.shape)


@dataclass(frozen=True)
class Picky(Scorer):
    """Fails in its own way."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError("strength must be positive")
        if self.strength > 9:
            raise KeyError("nine")

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.zeros(tokens.mask.shape)


TYPED = registry_of(
    entry(
        "p",
        module_with(
            scorers=[ScorerPlugin("typed", "a text", Typed), ScorerPlugin("picky", "a text", Picky)]
        ),
    )
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("'x'", "typed takes strength as float, got 'x' (str)"),
        ("True", "typed takes strength as float, got True (bool)"),
        ("rows=3", "typed takes rows as tuple[int, ...], got 3 (int)"),
        ("rows=(1, 2.5)", "typed takes rows as tuple[int, ...], got (1, 2.5) (tuple)"),
        ("name=3", "typed takes name as str | None, got 3 (int)"),
        ("strict=1", "typed takes strict as bool, got 1 (int)"),
        ("weight=1", "typed takes strength, rows, name, strict, loose: "),
    ],
)
def test_arguments_are_checked_when_a_spec_is_read(arguments: str, words: str) -> None:
    with installed_in(TYPED), pytest.raises(SpecError) as caught:
        parse(f"typed({arguments}) | evict(2)")
    assert words in str(caught.value)


def test_arguments_of_the_right_types_pass() -> None:
    with installed_in(TYPED):
        stage = parse("typed(2, rows=(1, 2), name='a', strict=True) | evict(2)")
        assert spec_of(stage.strategy).startswith("typed(strength=2, rows=(1, 2), name='a', stric")
        assert stage.placement == BeforeLLM()


@pytest.mark.parametrize(
    ("strength", "words"), [("-1", "strength must be positive"), ("10", "nine"), ("'x'", "'<' not")]
)
def test_a_step_that_fails_to_be_made_is_named(strength: str, words: str) -> None:
    with installed_in(TYPED), pytest.raises(SpecError, match=f"picky takes strength: .*{words}"):
        parse(f"picky({strength}) | evict(2)")
