"""Reduction inside open_clip towers, against plain loops over their blocks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from support.open_clip_towers import (
    LAYERS,
    PATCHES,
    TOWERS,
    WIDTH,
    WITH_CLS,
    Watch,
    blocks_of,
    maps,
    native,
    pictures,
    prefix_of,
    siglip,
)
from tokenprune import (
    AfterLayer,
    AttachError,
    BudgetError,
    ClsAttentionScorer,
    Evict,
    Kept,
    Plan,
    RandomScorer,
    Record,
    Reducer,
    Signals,
    Strategy,
    UnsupportedError,
    VisualTokens,
    attach,
    observe,
)
from tokenprune.plugins import registry
from tokenprune.testing.snapshot import (
    Interrupted,
    Snapshot,
    interrupted_installs,
    same_output,
)


class ByHand:
    """Runs one picture through the blocks of a tower, one after the other."""

    def __init__(self, tower: Any, picture: Tensor) -> None:
        self.tower = tower
        self.trunk = getattr(tower, "trunk", None)
        self.rope = None
        x = picture[None]
        if self.trunk is None:
            self.x = tower._embeds(x)
            self.first = tower.transformer.batch_first
        else:
            x = self.trunk.patch_embed(x)
            x = self.trunk._pos_embed(x)
            x, self.rope = x if isinstance(x, tuple) else (x, None)
            self.x = self.trunk.norm_pre(x)
            self.first = True
        self.places = torch.arange(PATCHES)
        self.sizes = torch.ones(PATCHES)
        self.front = prefix_of(tower)
        self.done = 0

    @property
    def patches(self) -> Tensor:
        return self.x[0, self.front :]

    def run(self, until: int) -> ByHand:
        for number in range(self.done, until):
            block = blocks_of(self.tower)[number]
            if self.rope is not None:
                rope = self.rope[number] if self.trunk.rope_mixed else self.rope
                self.x = block(self.x, rope=rope[..., self.places, :])
            elif self.first:
                self.x = block(self.x)
            else:
                self.x = block(self.x.transpose(0, 1)).transpose(0, 1)
        self.done = until
        return self

    def to(self, patches: Tensor, places: Tensor, sizes: Tensor) -> None:
        self.x = torch.cat([self.x[:, : self.front], patches[None]], dim=1)
        self.places, self.sizes = places, sizes

    def keep(self, chosen: Tensor) -> None:
        self.to(self.patches[chosen], self.places[chosen], self.sizes[chosen])

    def out(self) -> Any:
        self.run(LAYERS)
        if self.trunk is not None:
            return self.tower.head(self.trunk.forward_head(self.trunk.norm(self.x)))
        pooled, tokens = self.tower._pool(self.x)
        pooled = pooled @ self.tower.proj
        return (pooled, tokens) if self.tower.output_tokens else pooled


def cls_rows(tower: nn.Module, run: ByHand, number: int) -> Tensor:
    """`(heads, tokens)` of block `number` on what `run` holds now, from the whole attention map."""
    attention: Any = blocks_of(tower)[number].attn
    seen: list[tuple[Any, Any]] = []
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs.get("rope"))), with_kwargs=True
    )
    held, done = run.x, run.done
    run.done = number
    run.run(number + 1)
    run.x, run.done = held, done
    handle.remove()
    (x, rope), front = seen[0], run.front
    if isinstance(attention, nn.MultiheadAttention):
        weights = attention(x, x, x, need_weights=True, average_attn_weights=False)[1]
        return weights[0, :, 0, front:]
    with Watch() as watch:
        attention(x) if rope is None else attention(x, rope=rope)
    query, key = watch.seen[0]
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)[0, :, 0, front:]


def best(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores, the first ones of equals, in order."""
    ranked = sorted(range(len(scores)), key=lambda place: (-float(scores[place]), place))
    return torch.tensor(sorted(ranked[:count]))


def merged(x: Tensor, sizes: Tensor, keep: int) -> list[list[int]]:
    """ToMe's groups, in plain loops: even tokens find odd ones, the most similar pairs merge."""
    groups = [[place] for place in range(len(x))]
    while len(groups) > keep:
        mean = torch.stack([(x[g] * sizes[g, None]).sum(0) / sizes[g].sum() for g in groups])
        unit = torch.nn.functional.normalize(mean.double(), dim=1)
        similar = unit[::2] @ unit[1::2].T
        value, partner = similar.max(1)
        pairs = sorted(range(len(value)), key=lambda a: (-float(value[a]), a))
        pairs = pairs[: min(len(groups) - keep, len(groups) // 2)]
        gone = {2 * a: 2 * int(partner[a]) + 1 for a in pairs}
        joined = {place: list(group) for place, group in enumerate(groups) if place not in gone}
        for source, target in gone.items():
            joined[target] += groups[source]
        groups = sorted((sorted(group) for group in joined.values()), key=min)
    return groups


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def stacked(rows: list[Any]) -> Any:
    if isinstance(rows[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    return torch.cat(rows)


@pytest.mark.parametrize("name", WITH_CLS)
@torch.no_grad()
def test_eviction_by_cls_equals_a_plain_loop(name: str) -> None:
    tower, rows = TOWERS[name](), []
    for picture in pictures():
        run = ByHand(tower, picture)
        run.run(1)
        first = cls_rows(tower, run, 1)
        run.run(2)
        second = cls_rows(tower, run, 2)
        run.run(3)
        run.keep(best((first.mean(0) + second.mean(0)) / 2, PATCHES // 2))
        third = cls_rows(tower, run, 3)
        run.run(4)
        run.keep(best(third.mean(0), 5))
        rows.append(run.out())
    spec = (
        "cls-attention(layers=2) | evict(0.5) @ after-layer(3);"
        "cls-attention(layers=1) | evict(5) @ after-layer(4)"
    )
    with attach(tower, spec) as attached:
        got = tower(pictures())
        assert attached.report.layers == ((0, 3 * PATCHES), (3, 54), (4, 15))
        assert torch.equal(attached.last.tokens.patches[2], run.places)
    same(got, stacked(rows))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_two_merges_equal_a_plain_loop(name: str) -> None:
    tower, rows = TOWERS[name](), []
    for picture in pictures():
        run = ByHand(tower, picture)
        for layer, keep in ((2, 25), (4, 11)):
            run.run(layer)
            x, groups = run.patches, merged(run.patches, run.sizes, keep)
            sizes = run.sizes
            means = [(x[g] * sizes[g, None]).sum(0) / sizes[g].sum() for g in groups]
            firsts = run.places[torch.tensor([min(g) for g in groups])]
            run.to(torch.stack(means), firsts, torch.stack([sizes[g].sum() for g in groups]))
        rows.append(run.out())
    with attach(tower, "tome(25) @ after-layer(2); tome(11) @ after-layer(4)") as attached:
        got = tower(pictures())
        assert torch.equal(attached.last.tokens.sizes[2], run.sizes)
        assert float(run.sizes.sum()) == PATCHES
    same(got, stacked(rows))


STAGES = (
    "random(seed=3) | evict(0.5) @ after-layer(2)",
    "uniform | evict(9) @ after-layer(1)",
    "received-attention(layers=2) | evict(0.3) @ after-layer(2)",
    "tome(0.7, metric='keys', layer=-1) @ after-layer(2); tome(0.7) @ after-layer(4)",
    "kmeans(8) @ after-layer(3)",
    "similarity | evict(0.5) @ after-layer(1); random | evict(4) @ after-layer(4)",
)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("spec", STAGES)
@torch.no_grad()
def test_a_batch_equals_its_pictures_one_by_one(name: str, spec: str) -> None:
    tower = TOWERS[name]()
    vanilla = tower(pictures())
    with attach(tower, spec):
        got = tower(pictures())
        single = [tower(picture[None]) for picture in pictures()]
        swapped = tower(pictures().flip(0))
    same(got, stacked(single))
    same(swapped, tuple(g.flip(0) for g in got) if isinstance(got, tuple) else got.flip(0))
    pooled, before = (got[0], vanilla[0]) if isinstance(got, tuple) else (got, vanilla)
    assert pooled.shape == before.shape
    assert not torch.allclose(pooled, before, atol=1e-3)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_full_budget_changes_nothing(name: str) -> None:
    tower = TOWERS[name]()
    expected = tower(pictures())
    for spec in (
        "random | evict(1.0) @ after-layer(2)",
        f"tome({PATCHES}) @ after-layer(1); random | evict(10000) @ after-layer(4)",
    ):
        with attach(tower, spec) as attached:
            assert same_output(tower(pictures()), expected)
            assert all(image.before == image.after == PATCHES for image in attached.report.images)
            tower(pictures())
            assert attached.report.calls == 2


@pytest.mark.parametrize("name", ["native", "coca", "eva02", "siglip"])
@torch.no_grad()
def test_detaching_restores_the_tower(name: str) -> None:
    tower = TOWERS[name]()
    expected, before = tower(pictures()), Snapshot(tower)
    stages = tuple(
        Strategy(RandomScorer(), Evict(keep)).at(AfterLayer(layer))
        for layer, keep in ((1, 9), (3, 4))
    )
    with attach(tower, *stages):
        assert not before.differences(hooks=False)
        attached = tower(pictures())
        for block in (0, 2, LAYERS - 1):
            with _failing(blocks_of(tower)[block]), pytest.raises(Interrupted):
                tower(pictures())
            assert same_output(tower(pictures()), attached)
        assert not before.differences(hooks=False)
    assert not before.differences()
    assert same_output(tower(pictures()), expected)
    known = registry()
    adapter = known.claiming(known.models, tower, None).adapter()
    for count, left in interrupted_installs(
        lambda: adapter.install(tower, stages, Record()), before
    ):
        assert not left, count


class _failing:  # noqa: N801
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        def fail(module: nn.Module, args: Any) -> None:
            raise Interrupted

        self.handle = self.module.register_forward_pre_hook(fail)

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()


@given(
    keeps=st.lists(st.integers(1, PATCHES), min_size=1, max_size=3),
    layers=st.sets(st.integers(1, LAYERS - 1), min_size=3, max_size=3),
    seed=st.integers(0, 9),
)
@torch.no_grad()
def test_any_schedule_counts_right(keeps: list[int], layers: set[int], seed: int) -> None:
    tower, seen = TOWERS["native"](), []
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape[1] - 1))
        for block in blocks_of(tower)
    ]
    starts = sorted(layers)[: len(keeps)]
    spec = "; ".join(
        f"random(seed={seed}) | evict({keep}) @ after-layer({layer})"
        for keep, layer in zip(keeps, starts, strict=True)
    )
    with attach(tower, spec) as attached:
        tower(pictures(2))
        report = attached.report
    for handle in handles:
        handle.remove()
    expected, left = [], PATCHES
    for number in range(LAYERS):
        if number in starts:
            left = min(left, keeps[starts.index(number)])
        expected.append(left)
    assert seen == expected
    assert [(image.before, image.after) for image in report.images] == [(PATCHES, left)] * 2
    assert report.layers == ((0, 2 * PATCHES), *((n, 2 * expected[n]) for n in starts))


@torch.no_grad()
def test_which_patches_stay_matters() -> None:
    tower = TOWERS["native"]()
    answers = []
    for seed in (0, 1):
        with attach(tower, f"random(seed={seed}) | evict(3) @ after-layer(1)") as attached:
            answers.append(tower(pictures()))
            first, second, _ = attached.last.tokens.patches.tolist()
            assert first != second  # every picture has numbers of its own
    assert not torch.allclose(*answers, atol=1e-3)


@torch.no_grad()
def test_the_report_tells_what_is_left_of_each_picture() -> None:
    """After the last stage, counted over all patches; none where everything was withdrawn."""
    tower = TOWERS["native"]()
    with attach(tower, "random | evict(9) @ after-layer(1); tome(4) @ after-layer(2)") as attached:
        tower(pictures())
    positions = attached.last.tokens.patches.tolist()
    assert attached.report.kept == tuple(
        Kept("image", number, (0,) * 4, tuple(row)) for number, row in enumerate(positions)
    )
    stages = "random | evict(0) @ after-layer(1); uniform | evict(4) @ after-layer(2)"
    with attach(tower, stages) as attached:
        tower(pictures())
    assert attached.report.layers == ((0, 3 * PATCHES), (1, 0), (2, 0))
    assert [len(left) for left in attached.report.kept] == [0, 0, 0]


@torch.no_grad()
def test_encode_image_of_a_whole_model() -> None:
    from open_clip.model import CLIP

    vision = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 48}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
    torch.manual_seed(0)
    model = CLIP(16, vision, text).eval()
    x, words = pictures(), torch.randint(1, 64, (2, 8))
    vanilla, texts = model.encode_image(x), model.encode_text(words)
    with attach(model.visual, "cls-attention(layers=1) | evict(0.25) @ after-layer(1)") as pruned:
        got = model.encode_image(x, normalize=True)
        assert got.shape == vanilla.shape
        assert torch.equal(model.encode_text(words), texts)
        assert [image.after for image in pruned.report.images] == [9, 9, 9]
        with pytest.raises(UnsupportedError, match="forward_intermediates"):
            model.forward_intermediates(x, image_output_fmt="NCHW")
    assert torch.equal(model.encode_image(x), vanilla)


@pytest.mark.parametrize("name", ["native", "eva02", "siglip"])
@torch.no_grad()
def test_forward_intermediates_is_refused_while_pruned(name: str) -> None:
    tower: Any = TOWERS[name]()
    expected = tower.forward_intermediates(pictures(), output_fmt="NCHW")
    with attach(tower, "random | evict(16) @ after-layer(2)"):
        tower(pictures())
        for shape in ("NCHW", "NLC"):
            with pytest.raises(UnsupportedError, match=r"forward_intermediates.*detach first"):
                tower.forward_intermediates(pictures(), output_fmt=shape)
        with _failing(blocks_of(tower)[3]), pytest.raises(Interrupted):
            tower(pictures())
        with pytest.raises(UnsupportedError, match="forward_intermediates"):
            tower.forward_intermediates(pictures(), output_fmt="NCHW")
    assert same_output(tower.forward_intermediates(pictures(), output_fmt="NCHW"), expected)


def test_gradients_flow_to_what_stays() -> None:
    tower: Any = copy.deepcopy(TOWERS["native"]())
    x = pictures().requires_grad_()
    with attach(tower, "random | evict(9) @ after-layer(1)") as attached:
        tower(x).sum().backward()
    run = ByHand(tower, y := pictures()[1].requires_grad_())
    run.run(1).keep(attached.last.tokens.patches[1])
    run.out().sum().backward()
    assert x.grad is not None
    same(x.grad[1], y.grad)
    with attach(tower, "random | evict(9) @ after-layer(1); tome(4) @ after-layer(3)"):
        with torch.no_grad():
            expected = tower(pictures())
        got = tower(x)
        same(got, expected)
        tower.set_grad_checkpointing(True)
        with torch.no_grad():
            same(tower(pictures()), expected)
        with pytest.raises(UnsupportedError, match=r"gradient checkpointing.*switch it off"):
            tower(x)


@torch.no_grad()
def test_all_patches_may_go_where_cls_is_read() -> None:
    for name in ("native", "coca", "eva02", "perception"):
        tower = TOWERS[name]()
        with attach(tower, "random | evict(0) @ after-layer(3)") as attached:
            got = tower(pictures())
            assert [image.after for image in attached.report.images] == [0, 0, 0]
        run = ByHand(tower, pictures()[1])
        run.run(3).keep(torch.tensor([], dtype=torch.int64))
        row = tuple(part[1:2] for part in got) if isinstance(got, tuple) else got[1:2]
        same(row, run.out())
    for name in ("siglip", "averaged"):
        with pytest.raises(BudgetError, match=r"Evict.keep=0.*nothing to pool.*keep at least 1"):
            attach(TOWERS[name](), "random | evict(0) @ after-layer(3)")
    with pytest.raises(BudgetError, match="nothing to pool"):
        attach(native(pool_type="avg"), "random | evict(0) @ after-layer(3)")


SAYS = {
    "cls-attention | evict(9) @ before-llm": r"does not offer BeforeLLM.*'after-layer\(1\)' to "
    r"'after-layer\(4\)'.*observe",
    "cls-attention | evict(9) @ after-layer(5)": "leaves no block of VisionTransformer to save; it "
    "has 5 blocks",
    "cls-attention | evict(9) @ after-layer(2)": r"ClsAttention\(layers=3\) at after-layer\(2\).*"
    r"there are 2 \(0 to 1\), so layers=1 to layers=2",
    "tome(9) @ after-layer(2); cls-attention(layers=2) | evict(4) @ after-layer(3)": (
        r"have run on the same tokens: there are 1 \(2 to 2\)"
    ),
    "cls-attention(layers=(-1, 0)) | evict(4) @ after-layer(3); tome(2) @ after-layer(4)": None,
    "tome(9) @ after-layer(2); cls-attention(layers=(0,)) | evict(4) @ after-layer(3)": "-1 to -1",
    "tome(9, metric='keys', layer=-2) @ after-layer(1)": "-1 to -1 by number",
    "fastv | evict(9) @ after-layer(2)": "cannot supply LastQueryAttention.*Scorers that work "
    "here: cls-attention, .*random",
    "pool-attention | evict(9) @ after-layer(2)": "cannot supply PoolAttention",
    "random | evict(9) @ after-layer(2); tome(4) @ after-layer(2)": (
        r"two stages at after-layer\(2\); join their steps"
    ),
    "random | evict(9, per='frame') @ after-layer(2)": "a tower has no frames",
    "random | evict(9) @ after-layer(2, positions='reindexed')": "leave positions='original'",
}


@pytest.mark.parametrize("spec", SAYS)
def test_what_is_unsupported_is_refused_in_words(spec: str) -> None:
    tower, says = TOWERS["native"](), SAYS[spec]
    before = Snapshot(tower)
    if says is None:
        attach(tower, spec).detach()
    else:
        with pytest.raises(UnsupportedError, match=says):
            attach(tower, spec)
    assert not before.differences()


def test_a_tower_without_cls_lists_scorers_that_work() -> None:
    says = "TimmModel cannot supply ClsAttention.*work here: .*random, received-attention"
    with pytest.raises(UnsupportedError, match=says):
        attach(TOWERS["siglip"](), "cls-attention | evict(9) @ after-layer(3)")


@torch.no_grad()
def test_counts_that_differ_within_a_batch_are_refused() -> None:
    tower = TOWERS["native"]()

    class Ragged(Reducer):
        def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
            places = torch.arange(tokens.mask.shape[1])
            return Plan.select(places < 5 + torch.arange(len(tokens.mask))[:, None])

    with attach(tower, Strategy(Ragged()).at(AfterLayer(2))):
        assert tower(pictures(1)).shape == (1, 16)
        with pytest.raises(UnsupportedError, match="keeps 5 to 7 tokens of the pictures of one"):
            tower(pictures())


@torch.no_grad()
def test_an_attached_tower_is_not_observed() -> None:
    tower = TOWERS["native"]()
    scorer = ClsAttentionScorer(layers=1)
    with attach(tower, "random | evict(9) @ after-layer(2)"):
        with observe(tower, scorer.signals), pytest.raises(UnsupportedError, match="is attached"):
            tower(pictures())
        with pytest.raises(AttachError, match="already attached"):
            attach(tower, "random | evict(4) @ after-layer(3)")
        with pytest.raises(AttachError, match="detach before copying"):
            copy.deepcopy(tower)
        with pytest.raises(AttachError, match="detach before pickling"):
            pickle.dumps(tower)


def test_masks_are_refused() -> None:
    tower: Any = TOWERS["native"]()
    held = blocks_of(tower)[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attn_mask": torch.zeros(37, 37)}),
        with_kwargs=True,
    )
    try:
        with (
            attach(tower, "random | evict(9) @ after-layer(1)"),
            pytest.raises(UnsupportedError, match="runs with an attention mask"),
        ):
            tower(pictures())
    finally:
        held.remove()


def test_patches_dropped_at_random_are_refused() -> None:
    for tower in (native(patch_dropout=0.5), siglip(patch_drop_rate=0.5)):
        with attach(tower, "random | evict(9) @ after-layer(2)"):
            tower(pictures())
            tower.train()
            with pytest.raises(UnsupportedError, match="drops patches at random"):
                tower(pictures())


@torch.no_grad()
def test_tokens_that_a_tower_returns_are_those_kept() -> None:
    tower = native(output_tokens=True)
    with attach(tower, "random | evict(9) @ after-layer(2)"):
        pooled, tokens = tower(pictures())
    assert pooled.shape == (3, 16)
    assert tokens.shape == (3, 9, WIDTH)
    pooling = TOWERS["coca"]()
    vanilla = pooling(pictures())
    with attach(pooling, "random | evict(9) @ after-layer(2)"):
        pooled, tokens = pooling(pictures())
    assert (pooled.shape, tokens.shape) == (vanilla[0].shape, vanilla[1].shape)


@torch.no_grad()
def test_half_precision() -> None:
    for name in ("native", "eva02", "siglip"):
        tower = copy.deepcopy(TOWERS[name]()).bfloat16()
        with attach(tower, "tome(20) @ after-layer(2); random | evict(8) @ after-layer(3)"):
            got = tower(pictures().bfloat16())
        assert got.dtype == torch.bfloat16
        assert bool(got.isfinite().all())


def test_maps_of_the_oracle_are_what_they_are_taken_for() -> None:
    every = maps(TOWERS["native"](), pictures())
    run = ByHand(TOWERS["native"](), pictures()[0]).run(2)
    same(cls_rows(TOWERS["native"](), run, 2), every[2][0, :, 0, 1:])
    assert len(every) == LAYERS
