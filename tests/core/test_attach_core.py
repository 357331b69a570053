"""`attach` and `observe` on a fake model: what core promises whatever the adapter is."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from core.fakes import (
    FakeAdapter,
    FakeTowerAdapter,
    Model,
    Nearer,
    Tower,
    entry,
    hooks_in,
    installed,
    module_with,
    name_of,
)
from tokenprune import (
    AfterLayer,
    AttachError,
    BeforeLLM,
    ClsAttention,
    ClsAttentionScorer,
    Evict,
    Keys,
    MissingSignalError,
    ModelAdapter,
    ModelPlugin,
    Observation,
    Placement,
    RandomScorer,
    Record,
    Removable,
    Scorer,
    ScorerPlugin,
    ShapeError,
    Signal,
    Signals,
    SpecError,
    Stage,
    Strategy,
    TowerPlugin,
    UnknownNameError,
    UnsupportedError,
    VisualTokens,
    attach,
    observe,
)

MODELS = module_with(
    models=[ModelPlugin("fake", "a fake", FakeAdapter, (name_of(Model),))],
    towers=[TowerPlugin("fake-tower", "a fake", FakeTowerAdapter, (name_of(Tower),))],
)
PIXELS = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fakes() -> Iterator[None]:
    with installed(entry("fakes", MODELS)):
        yield


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


# --------------------------------------------------------------------------- attach and detach


def test_attaching_works_and_leaving_restores(model: Model) -> None:
    before, weights = model(PIXELS), copy.deepcopy(model.state_dict())
    with attach(model, "random | evict(2)") as pruned:
        assert hooks_in(model) == 3
        assert not torch.equal(model(PIXELS), before)
        assert pruned.last.tokens.lengths == (2, 2)
        assert [(i.before, i.after) for i in pruned.report.images] == [(6, 2), (6, 2)]
    assert hooks_in(model) == 0
    assert torch.equal(model(PIXELS), before)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert pruned.report.tokens_after == 4  # still to be read afterwards


def test_leaving_by_an_exception_restores(model: Model) -> None:
    with pytest.raises(RuntimeError, match="shapes"), attach(model, "random | evict(2)"):
        model(torch.zeros(2, 6, 5))
    assert hooks_in(model) == 0
    with attach(model, "random | evict(2)"):
        model(PIXELS)


def test_an_exception_in_forward_leaves_the_attachment_usable(model: Model) -> None:
    with attach(model, "random | evict(2)") as pruned:
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.zeros(2, 6, 5))
        model(PIXELS)
        assert pruned.report.calls == 1
    assert hooks_in(model) == 0


def test_detaching_twice_is_harmless(model: Model) -> None:
    pruned = attach(model, "random | evict(2)")
    pruned.detach()
    pruned.detach()
    with pruned:  # entering it again installs nothing
        assert hooks_in(model) == 0
    again = attach(model, "uniform | evict(2)")
    pruned.detach()  # and cannot disturb a later one
    assert hooks_in(model) == 3
    with pytest.raises(AttachError, match="already attached with 'uniform"):
        attach(model, "random | evict(2)")
    again.detach()
    assert hooks_in(model) == 0


def test_attaching_twice_is_refused(model: Model) -> None:
    with attach(model, "random | evict(2)"):
        with pytest.raises(AttachError) as caught:
            attach(model, "uniform | evict(3)")
        assert str(caught.value) == (
            "Model is already attached with 'random | evict(2) @ before-llm'; detach it first, "
            "or give all stages to one attach call"
        )
        assert isinstance(caught.value, RuntimeError)
        assert hooks_in(model) == 3
    attach(model, "uniform | evict(3)").detach()


def test_a_model_around_an_attached_one_is_refused_too(model: Model) -> None:
    class Around(Model):
        def __init__(self, inner: Model) -> None:
            super().__init__()
            self.inner = inner

    with (
        attach(model, "random | evict(2)"),
        pytest.raises(AttachError, match="which has parts of this Around, is already attached"),
    ):
        attach(Around(model), "random | evict(2)")


def test_models_that_share_a_part_are_refused(model: Model) -> None:
    other = Model()
    other.tower = model.tower
    with attach(model, "random | evict(2)"):
        with pytest.raises(AttachError, match="Model, which has parts of this Model, is already"):
            attach(other, "random | evict(2)")
        attach(Model(), "random | evict(2)").detach()
    attach(other, "random | evict(2)").detach()


def test_an_attachment_that_nobody_holds_is_still_known(model: Model) -> None:
    attach(model, "random | evict(2)")
    gc.collect()
    assert hooks_in(model) == 3
    with pytest.raises(AttachError, match="is already attached"):
        attach(model, "random | evict(2)")


def test_attaching_keeps_no_model_alive() -> None:
    model = Model()
    gone = weakref.ref(model)
    pruned = attach(model, "random | evict(2)")
    model(PIXELS)
    del model
    gc.collect()
    assert gone() is None
    assert pruned.report.calls == 1
    pruned.detach()  # with nothing left to restore


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_half_failed_install_removes_what_it_had_installed(model: Model, fail_at: int) -> None:
    class Fails(FakeAdapter):
        pass

    Fails.fail_at = fail_at
    plugin = ModelPlugin("fails", "fails half-way", Fails, (name_of(Model),))
    with installed(entry("p", module_with(models=[plugin]))):
        with pytest.raises(RuntimeError, match="half-way"):
            attach(model, "random | evict(2)")
        assert hooks_in(model) == 0
    attach(model, "random | evict(2)").detach()  # and the model is not taken for attached


def test_a_handle_that_cannot_be_removed_does_not_keep_the_others(model: Model) -> None:
    class Stuck:
        def remove(self) -> None:
            raise OSError("stuck")

    class Sticks(FakeAdapter):
        def install(
            self, model: nn.Module, stages: tuple[Stage, ...], record: Record
        ) -> Iterator[Removable]:
            yield from super().install(model, stages, record)
            yield Stuck()

    plugin = ModelPlugin("sticks", "sticks", Sticks, (name_of(Model),))
    with installed(entry("p", module_with(models=[plugin]))):
        pruned = attach(model, "random | evict(2)")
        with pytest.raises(OSError, match="stuck"):
            pruned.detach()
        assert hooks_in(model) == 0
        pruned.detach()
    attach(model, "random | evict(2)").detach()


def test_an_attachment_shows_its_stages(model: Model) -> None:
    stage = Strategy(RandomScorer(3), Evict(2)).at(BeforeLLM())
    with attach(model, stage) as pruned:
        assert pruned.stages == (stage,)
        assert pruned.spec == "random(seed=3) | evict(2) @ before-llm"
        assert repr(pruned) == "Attachment('random(seed=3) | evict(2) @ before-llm')"
        with pytest.raises(AttachError, match="no image has been reduced yet"):
            pruned.last  # noqa: B018


def test_a_scorer_that_no_plugin_offers_can_be_attached(model: Model) -> None:
    """Objects are the real API; a step without a name shows in specs as its repr."""

    class MyScorer(RandomScorer):
        """Made in a notebook."""

    with attach(model, Strategy(MyScorer(), Evict(2)).at(BeforeLLM())) as pruned:
        model(PIXELS)
        assert "MyScorer" in repr(pruned)
        with pytest.raises(AttachError, match="already attached with .*MyScorer"):
            attach(model, "random | evict(2)")
        assert pruned.spec == "MyScorer(seed=0) | evict(2) @ before-llm".replace(
            "MyScorer", MyScorer.__qualname__
        )


def test_a_subclass_without_an_adapter_of_its_own_is_served(model: Model) -> None:
    with attach(Nearer(), "random | evict(2)") as pruned:
        assert pruned.stages


# ------------------------------------------------------------------------------------ refusals


def test_stages_are_needed_and_must_be_stages(model: Model) -> None:
    with pytest.raises(SpecError, match="attach needs at least one stage"):
        attach(model)
    with pytest.raises(SpecError, match=r"a stage must be a spec or a Stage, got Strategy\(") as c:
        attach(model, Strategy(RandomScorer(), Evict(2)))  # type: ignore[arg-type]
    assert "strategy.at(BeforeLLM())" in str(c.value)
    with pytest.raises(UnknownNameError, match="unknown strategy 'nope'"):
        attach(model, "nope | evict(2)")
    assert hooks_in(model) == 0


@pytest.mark.parametrize("target", [nn.Linear(2, 2), "a name on the hub", None])
def test_what_no_adapter_claims_is_refused(target: object) -> None:
    name = type(target).__name__
    with pytest.raises(UnsupportedError, match=f"no adapter supports .*{name} as a model; supp"):
        attach(target, "random | evict(2)")  # type: ignore[arg-type]


def test_unknown_adapters_list_the_known_ones(model: Model) -> None:
    with pytest.raises(UnknownNameError, match="no model adapter is called 'x'; known: fake"):
        attach(model, "random | evict(2)", adapter="x")
    attach(model, "random | evict(2)", adapter="fake").detach()


def test_placements_that_the_model_does_not_offer_are_refused(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="Model offers 'before-llm' only"):
        attach(model, Strategy(RandomScorer(), Evict(2)).at(AfterLayer(2)))
    assert hooks_in(model) == 0


@dataclass(frozen=True)
class WantsKeys(Scorer):
    """Reads what the fake model cannot give."""

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({Keys(-2)})

    def score(self, tokens: VisualTokens, signals: Signals) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True, init=False)
class NeedsArguments(WantsKeys):
    """Cannot be made without arguments, so nobody knows what it needs."""

    def __init__(self, layer: int) -> None:
        raise NotImplementedError


def test_signals_that_the_model_cannot_supply_are_refused(model: Model) -> None:
    scorers = [
        ScorerPlugin("wants-keys", "keys", WantsKeys),
        ScorerPlugin("needs-arguments", "unknown", NeedsArguments),
    ]
    with installed(entry("fakes", MODELS), entry("p", module_with(scorers=scorers))):
        with pytest.raises(UnsupportedError) as caught:
            attach(model, Strategy(WantsKeysToo(), Evict(2)).at(BeforeLLM()))
        assert "Model cannot supply Keys to " in str(caught.value)
        assert "it supplies ClsAttention. Scorers that work here: " in str(caught.value)
        working = str(caught.value).rpartition(": ")[2].split(", ")
        assert {"cls-attention", "random", "uniform"} <= set(working)
        assert not {"wants-keys", "needs-arguments"} & set(working)
    assert hooks_in(model) == 0


class Bare(FakeAdapter):
    """A model from which nothing can be read."""

    given: frozenset[type[Signal]] = frozenset()


def test_a_model_without_signals_says_so(model: Model) -> None:
    plugin = ModelPlugin("bare", "gives nothing", Bare, (name_of(Model),))
    with installed(entry("p", module_with(models=[plugin]))):
        with pytest.raises(UnsupportedError) as caught:
            attach(model, "cls-attention | evict(2)")
        assert "cannot supply ClsAttention to 'cls-attention | evict(2) @ before-llm'; " in str(
            caught.value
        )
        assert "it supplies no signals. Scorers that work here: " in str(caught.value)
        working = str(caught.value).rpartition(": ")[2].split(", ")
        assert {"random", "uniform"} <= set(working)
        assert "cls-attention" not in working
        attach(model, "random | evict(2)").detach()


def test_an_adapter_may_refuse_before_it_installs(model: Model) -> None:
    class Refuses(ModelAdapter):
        def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
            return frozenset()

        def install(
            self, model: nn.Module, stages: tuple[Stage, ...], record: Record
        ) -> Iterator[Removable]:
            raise UnsupportedError(f"{len(stages)} stages are too many")

    plugin = ModelPlugin("refuses", "refuses", Refuses, (name_of(Model),))
    with installed(entry("p", module_with(models=[plugin]))):
        with pytest.raises(UnsupportedError, match="2 stages are too many"):
            attach(model, "random | evict(2)", "uniform | evict(1) @ after-layer")
        with pytest.raises(UnsupportedError, match="2 stages are too many"):
            attach(model, "random | evict(2); uniform | evict(1) @ after-layer")


# ------------------------------------------------------------------------------------- observe


def test_observing_reads_and_changes_nothing() -> None:
    tower = Tower()
    before = tower(PIXELS)
    with observe(tower, [ClsAttention(1)]) as seen:
        assert not seen.ready
        with pytest.raises(MissingSignalError, match="the tower has not run yet"):
            seen.tokens  # noqa: B018
        with pytest.raises(MissingSignalError, match="the tower has not run yet"):
            seen.signals  # noqa: B018
        assert torch.equal(tower(PIXELS), before)
        assert torch.equal(seen.tokens.features, before)
        assert torch.equal(seen.signals[ClsAttention(1)][:, 0, 0], before.mean(-1))
        scores = ClsAttentionScorer(1).score(seen.tokens, seen.signals)
        assert torch.equal(scores, before.mean(-1))
        tower(PIXELS[:1])
        assert len(seen.tokens.features) == 1  # the latest pass
        tokens, _ = seen.take()
        assert len(tokens.features) == 1
        assert not seen.ready
    assert hooks_in(tower) == 0


def test_observing_refuses_what_the_tower_cannot_give() -> None:
    tower = Tower()
    with (
        pytest.raises(UnsupportedError, match="Tower cannot give Keys; it gives ClsAttention"),
        observe(tower, [Keys(-2), ClsAttention(1)]),
    ):
        pass
    with pytest.raises(UnsupportedError, match="as a tower"), observe(nn.Linear(2, 2), []):
        pass
    with pytest.raises(UnknownNameError), observe(tower, [], adapter="x"):
        pass
    assert hooks_in(tower) == 0


def test_observing_ends_with_an_exception_too() -> None:
    tower = Tower()
    with pytest.raises(KeyError), observe(tower, []):
        raise KeyError
    assert hooks_in(tower) == 0


# --------------------------------------------------------------------------------- observation


def test_a_pass_that_never_began_is_noticed() -> None:
    with pytest.raises(AttachError, match="ran outside of the tower's own forward"):
        Observation().scratch  # noqa: B018


def test_a_new_pass_forgets_the_one_before() -> None:
    seen = Observation()
    seen.begin()
    seen.scratch["x"] = torch.zeros(1)
    seen.finish(VisualTokens.of(PIXELS), {})
    assert seen.ready
    with pytest.raises(AttachError):
        seen.scratch  # noqa: B018
    seen.begin()
    assert not seen.ready
    assert seen.scratch == {}


def test_signals_are_checked_where_they_are_published() -> None:
    with pytest.raises(ShapeError, match="must have axes"):
        Observation().finish(VisualTokens.of(PIXELS), {ClsAttention(1): torch.zeros(2)})


def test_threads_do_not_see_each_others_passes() -> None:
    seen, wait = Observation(), threading.Barrier(4)
    read: dict[int, float] = {}

    def work(number: int) -> None:
        seen.begin()
        seen.finish(VisualTokens.of(torch.full((1, 2, 1), float(number))), {})
        wait.wait()
        read[number] = seen.take()[0].features[0, 0, 0].item()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == {number: number for number in range(4)}
    assert not seen.ready


def test_state_of_hooks_is_not_copied_or_pickled() -> None:
    with pytest.raises(AttachError, match="detach before copying a model"):
        copy.deepcopy(Observation())
    with pytest.raises(AttachError, match="detach before pickling a model; ship the spec instead"):
        pickle.dumps(Observation())


class WantsKeysToo(WantsKeys):
    """A scorer that no plugin offers: its stage has no spec, but can be refused all the same."""


# ------------------------------------------------------------------- options nobody knows


class Knows(FakeAdapter):
    """Serves budgets for crops, and positions as they were."""

    options: ClassVar[dict[str, tuple[object, ...]]] = {
        "per": ("crop",),
        "positions": ("original",),
    }


OPTIONS = {
    "random | evict(2, per='crop')": "per='crop' in \"evict(2, per='crop')\"",
    "random | evict(2, per='frame')": "per='frame' in \"evict(2, per='frame')\"",
    "random | evict(2) @ before-llm(positions='original')": "positions='original' in",
    "random | evict(2) @ before-llm(newline='drop')": "newline='drop' in",
}


@pytest.mark.parametrize("spec", OPTIONS)
def test_an_option_that_an_adapter_does_not_know_is_refused(spec: str, model: Model) -> None:
    """It would be accepted, and change nothing."""
    with pytest.raises(UnsupportedError) as caught:
        attach(model, spec)
    assert OPTIONS[spec] in str(caught.value)
    assert "is not served for Model: FakeAdapter serves" in str(caught.value)
    assert hooks_in(model) == 0


@pytest.mark.parametrize(("spec", "served"), zip(OPTIONS, (True, False, True, False), strict=True))
def test_an_adapter_says_which_options_it_serves(spec: str, served: bool, model: Model) -> None:
    knows = ModelPlugin("knows", "a model", Knows, (name_of(Model),))
    with installed(entry("p", module_with(models=[knows]))):
        if served:
            attach(model, spec).detach()
            return
        with pytest.raises(UnsupportedError, match="Knows serves .*="):
            attach(model, spec)


def test_an_adapter_that_is_asked_for_but_does_not_fit_is_refused(model: Model) -> None:
    other = ModelPlugin("other", "a model", Knows, ("package.module.Other",))
    with (
        installed(entry("fakes", MODELS), entry("p", module_with(models=[other]))),
        pytest.raises(UnsupportedError, match="'other' is for Other, not for Model; what fits is"),
    ):
        attach(model, "random | evict(2)", adapter="other")
