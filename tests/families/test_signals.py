"""Signals of towers equal their eager maps, averaged by hand over the patches of each token."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokenprune
from support.families import FAMILIES, GRIDS, Tiny, collate
from tokenprune import (
    BeforeLLM,
    ClsAttention,
    Evict,
    GivenAttention,
    JointClsAttention,
    Keys,
    ReceivedAttention,
    Scorer,
    Strategy,
    UnsupportedError,
)

NAMED = {tiny.name: tiny for tiny in FAMILIES}


class Seen(Scorer):
    """Scorer that keeps what it is given."""

    seen: ClassVar[list[Any]] = []

    def __init__(self, *signals: Any) -> None:
        self.wanted = signals

    @property
    def signals(self) -> frozenset[Any]:
        return frozenset(self.wanted)

    def score(self, tokens: Any, signals: Any) -> Tensor:
        self.seen.append((tokens, {each: signals[each] for each in self.wanted}))
        return torch.zeros(tokens.mask.shape).masked_fill(~tokens.mask, -torch.inf)


def maps(model: Any, blocks: Any, call: Callable[[], Any], monkeypatch: Any) -> list[list[Tensor]]:
    """Eager attention maps of each block, one for each picture that is a chunk of its own."""
    found: dict[int, list[Tensor]] = {}
    first = next(iter(blocks))
    attention = next(each for each in first.modules() if type(each).__name__.endswith("Attention"))
    module = sys.modules[type(attention).__module__]
    inside = {id(each): n for n, block in enumerate(blocks) for each in block.modules()}
    original = module.eager_attention_forward

    def forward(of: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(of, *args, **kwargs)
        if id(of) in inside:
            found.setdefault(inside[id(of)], []).append(weights)
        return out, weights

    monkeypatch.setattr(module, "eager_attention_forward", forward)
    call()
    monkeypatch.undo()
    return [found[number] for number in sorted(found)]


def squares(side: int, factor: int) -> list[list[int]]:
    return [
        [
            (row * factor + y) * side + column * factor + x
            for y in range(factor)
            for x in range(factor)
        ]
        for row in range(side // factor)
        for column in range(side // factor)
    ]


def fours(tokens: int) -> list[list[int]]:
    return [list(range(4 * token, 4 * token + 4)) for token in range(tokens)]


def windowed(grid: tuple[int, int, int]) -> list[list[int]]:
    """Patches in the order of windows of 2 x 2 tokens, as a list for each token in raster order."""
    time, height, width = grid[0], grid[1] // 2, grid[2] // 2
    order = [
        (t * height + row) * width + column
        for t in range(time)
        for top in range(0, height, 2)
        for left in range(0, width, 2)
        for row in range(top, min(top + 2, height))
        for column in range(left, min(left + 2, width))
    ]
    return [fours(len(order))[order.index(token)] for token in range(len(order))]


LAYER = {"vipllava": -2}
CASES = {
    "qwen2-vl": ("visual.blocks", 0, lambda part: fours(_tokens(part))),
    "qwen2.5-vl": ("visual.blocks", 0, lambda part: windowed(GRIDS[part[2]])),
    "qwen3-vl": ("visual.blocks", 0, lambda part: fours(_tokens(part))),
    "internvl": ("vision_tower.encoder.layer", 1, lambda part: squares(8, 2)),
    "vipllava": ("vision_tower.encoder.layers", 1, lambda part: [[patch] for patch in range(16)]),
    "smolvlm": ("vision_model.encoder.layers", 0, lambda part: squares(8, 2)),
}


def _tokens(part: Any) -> int:
    time, height, width = GRIDS[part[2]]
    return time * height * width // 4


@pytest.mark.parametrize("name", list(CASES))
def test_signals_are_those_of_the_eager_map(name: str, monkeypatch: Any) -> None:
    tiny: Tiny = NAMED[name]
    path, prefix, members = CASES[name]
    plain, inputs = tiny.make("eager"), collate(tiny, tiny.rows)
    blocks = plain.model
    for part in path.split("."):
        blocks = getattr(blocks, part)
    with torch.no_grad():
        found = maps(plain, blocks, lambda: plain(**inputs), monkeypatch)[LAYER.get(name, -1)]
    model = tiny.make("sdpa")
    kinds = [ReceivedAttention(1), GivenAttention(1)] + ([ClsAttention(1)] if prefix else [])
    Seen.seen.clear()
    with (
        torch.no_grad(),
        tokenprune.attach(
            model,
            Strategy(Seen(*kinds), Evict(4, per="crop" if tiny.split else "image")).at(BeforeLLM()),
        ),
    ):
        model(**inputs)
    # Pictures that are patches in a row are chunks; tiles are rows of one batch.
    chunks = [one for each in found for one in (each if len(each) > 1 else [each[0]])]
    parts = [part for row in tiny.rows for part in row.parts if isinstance(part, tuple)]
    parts = sorted(parts, key=lambda part: part[0] == "video")
    rows = [(seen, signals, row) for seen, signals in Seen.seen for row in range(len(seen.mask))]
    if name in ("vipllava", "internvl", "smolvlm"):
        parts, counts = [parts[0]] * len(rows), [1] * len(rows)
    else:  # frames of a video are chunks
        counts = [GRIDS[part[2]][0] if part[0] == "video" else 1 for part in parts]
    assert len(rows) == len(parts)
    assert sum(counts) == len(chunks)
    for (seen, signals, row), part, count in zip(rows, parts, counts, strict=True):
        mine, chunks = chunks[:count], chunks[count:]
        groups = torch.tensor(members(part))
        among = [each[:, prefix:, prefix:] for each in mine]
        wanted = {
            ReceivedAttention(1): torch.cat([each.mean(1) for each in among], dim=1),
            GivenAttention(1): torch.cat([each.mean(2) for each in among], dim=1),
        }
        if prefix:
            wanted[ClsAttention(1)] = torch.cat([each[:, 0, prefix:] for each in mine], dim=1)
        for kind in kinds:
            tokens = wanted[kind][:, groups].mean(-1)
            got = signals[kind][row, 0, :, : tokens.shape[1]]
            torch.testing.assert_close(got, tokens, atol=1e-6, rtol=0)
            assert seen.lengths[row] == tokens.shape[1]


@pytest.mark.parametrize(("name", "prefix"), [("llava-onevision", 0), ("llava-next-video", 1)])
def test_packed_tiles_and_pooled_frames_have_the_signals_of_their_patches(
    name: str, prefix: int, monkeypatch: Any
) -> None:
    """Newlines have none; a pooled token has the mean of its square."""
    if name not in NAMED:
        pytest.skip("this transformers has another LLaVA-NeXT-Video")
    tiny = NAMED[name]
    plain, inputs = tiny.make("eager"), collate(tiny, tiny.rows)
    tower: Any = plain.model.vision_tower
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    with torch.no_grad():
        found = maps(plain, blocks, lambda: plain(**inputs), monkeypatch)[-1 if not prefix else -2]
    kinds = [ReceivedAttention(1), GivenAttention(1)] + ([ClsAttention(1)] if prefix else [])
    Seen.seen.clear()
    model = tiny.make("sdpa")
    with (
        torch.no_grad(),
        tokenprune.attach(model, Strategy(Seen(*kinds), Evict(4)).at(BeforeLLM())),
    ):
        model(**inputs)
    assert tiny.patch is not None
    first, second, _ = (patches[patches >= 0] for patches in tiny.patch({}))
    frames = [[f * 16 + patch for patch in group] for f in range(3) for group in squares(4, 2)]
    members = [
        (0, 0, first[:, None]),
        (0, 1, second[:, None] + 3 * 16),  # three crops of the first come before it
        (1, 0, torch.tensor(frames)),
    ]
    for call, row, groups in members:
        seen, signals = Seen.seen[call]
        whole = found[call][:, :, prefix:, prefix:]
        of_patches = {
            ReceivedAttention(1): whole.mean(2),
            GivenAttention(1): whole.mean(3),
        }
        if prefix:
            of_patches[ClsAttention(1)] = found[call][:, :, 0, prefix:]
        assert seen.lengths[row] == len(groups)
        for kind in kinds:
            wanted = of_patches[kind].transpose(0, 1).flatten(1)[:, groups].mean(-1)
            got = signals[kind][row, 0, :, : len(groups)]
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "merged"), [("mistral3", 2), ("llava-pixtral", 1)])
def test_pictures_of_any_size_in_one_row(name: str, merged: int, monkeypatch: Any) -> None:
    """Eager maps of all pictures together, of which others than one's own are masked."""
    tiny = NAMED[name]
    plain, inputs = tiny.make("eager"), collate(tiny, tiny.rows)
    blocks = plain.model.vision_tower.transformer.layers
    with torch.no_grad():
        ((whole,),) = maps(plain, blocks, lambda: plain(**inputs), monkeypatch)[-1:]
    kinds = [ReceivedAttention(1), GivenAttention(1)]
    Seen.seen.clear()
    model = tiny.make("sdpa")
    with (
        torch.no_grad(),
        tokenprune.attach(model, Strategy(Seen(*kinds), Evict(4)).at(BeforeLLM())),
    ):
        model(**inputs)
    ((seen, signals),) = Seen.seen
    first = 0
    for row, (high, wide) in enumerate((inputs["image_sizes"] // 4).tolist()):
        mine = whole[0, :, first : first + high * wide, first : first + high * wide]
        torch.testing.assert_close(mine.sum(-1), torch.ones(mine.shape[:2]))  # all that it sees
        first += high * wide
        groups = [
            [(top + y) * wide + left + x for y in range(merged) for x in range(merged)]
            for top in range(0, high, merged)
            for left in range(0, wide, merged)
        ]
        assert seen.lengths[row] == len(groups)
        for kind, map_ in zip(kinds, (mine.mean(1), mine.mean(2)), strict=True):
            got = signals[kind][row, 0, :, : len(groups)]
            torch.testing.assert_close(got, map_[:, groups].mean(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llava-onevision", "vipllava"])
def test_another_tower_than_described_is_refused(name: str) -> None:
    model = NAMED[name].make("sdpa")
    model.config.vision_config.model_type = "dinov2"
    with pytest.raises(UnsupportedError, match="of a tower of the type .*, got dinov2; rank by"):
        tokenprune.attach(model, "received-attention | evict(4)")
    tokenprune.attach(model, "diverse(4)").detach()


@pytest.mark.parametrize(
    ("name", "path", "query", "key", "groups"),
    [
        ("internvl", "vision_tower.encoder.layer.2.attention", "q_norm", "k_norm", squares(8, 2)),
        ("vipllava", "vision_tower.*encoder.layers.1.self_attn", "q_proj", "k_proj", None),
    ],
)
def test_keys_and_the_joint_row_are_those_of_the_projections(
    name: str, path: str, query: str, key: str, groups: Any
) -> None:
    """Of the block that gives the features; softmax of all heads as one over their channels."""
    tiny = NAMED[name]
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows)
    (block,) = (each for key_, each in model.model.named_modules() if re.fullmatch(path, key_))
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: made.update({name: output})

    handles = [getattr(block, each).register_forward_hook(keep(each)) for each in (query, key)]
    Seen.seen.clear()
    kinds = [Keys(int(path.split(".")[-2])), JointClsAttention(1)]
    evict = Evict(4, per="crop" if tiny.split else "image")
    with torch.no_grad(), tokenprune.attach(model, Strategy(Seen(*kinds), evict).at(BeforeLLM())):
        model(**inputs)
    for handle in handles:
        handle.remove()
    ((_, signals),) = Seen.seen
    q, k = made[query].double(), made[key].double()
    patches = k.shape[1] - 1
    members = torch.tensor(groups or [[patch] for patch in range(patches)])
    heads = k[:, 1:].unflatten(2, (2, -1)).transpose(1, 2)[:, :, members].mean(3)
    torch.testing.assert_close(signals[kinds[0]].double(), heads, atol=1e-6, rtol=0)
    row = torch.softmax((k @ q[:, 0, :, None]).squeeze(2) / k.shape[2] ** 0.5, dim=1)[:, 1:]
    joint = row[:, members].mean(2)[:, None]
    torch.testing.assert_close(signals[kinds[1]].double(), joint, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "llava-pixtral", "mistral3"])
def test_keys_of_rotated_towers_are_those_before_it(name: str) -> None:
    """Of patches in a row: of the first picture, by what the projection gives."""
    tiny = NAMED[name]
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows[:1])
    core = model.model
    qwen = "qwen" in name
    layers = core.visual.blocks if qwen else core.vision_tower.transformer.layers
    made: list[Tensor] = []
    module = layers[1].attn.qkv if qwen else layers[1].attention.k_proj
    handle = module.register_forward_hook(lambda module, args, output: made.append(output))
    Seen.seen.clear()
    with (
        torch.no_grad(),
        tokenprune.attach(model, Strategy(Seen(Keys(1)), Evict(4)).at(BeforeLLM())),
    ):
        model(**inputs)
    handle.remove()
    ((tokens, signals),) = Seen.seen
    keys = made[0].reshape(-1, 3, 2, 16)[:, 1] if qwen else made[0].reshape(-1, 2, 16)
    first = tokens.lengths[0]
    if qwen:
        groups = torch.arange(first * 4).reshape(-1, 4)
    else:
        high, wide = (inputs["image_sizes"][0] // 4).tolist()
        side = 2 if name == "mistral3" else 1
        grid = torch.arange(high * wide).reshape(high // side, side, wide // side, side)
        groups = grid.transpose(1, 2).reshape(-1, side * side)
    wanted = keys[groups].mean(1).transpose(0, 1)
    torch.testing.assert_close(signals[Keys(1)][0, :, :first], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *itertools.product(("internvl", "vipllava"), ("prumerge(keep=0.5)", "visionzip(keep=0.5)")),
        ("qwen2.5-vl", "received-attention(layers=1) | dominant-contextual(0.5)"),
        ("mistral3", "received-attention(layers=1) | dominant-contextual(0.5)"),
    ],
)
def test_methods_that_read_keys_work_where_there_are_any(name: str, spec: str) -> None:
    tiny = NAMED[name]
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows)
    with torch.no_grad(), tokenprune.attach(model, spec) as attachment:
        assert model(**inputs).logits.isfinite().all()
    assert 0 < attachment.report.tokens_after < attachment.report.tokens_before


def test_a_family_whose_tower_has_no_cls_says_what_works() -> None:
    model = NAMED["mistral3"].make("sdpa")
    with pytest.raises(UnsupportedError, match="cannot supply ClsAttention.*that work here"):
        tokenprune.attach(model, "cls-attention | evict(4)")


def test_positions_of_three_planes_cannot_be_counted_anew() -> None:
    model = NAMED["qwen2-vl"].make("sdpa")
    with pytest.raises(UnsupportedError, match="time, row and column, which cannot be counted"):
        tokenprune.attach(model, "uniform | evict(4) @ before-llm(positions='reindexed')")


def test_tiles_with_padded_pixels_are_refused_where_their_attention_is_read() -> None:
    tiny = NAMED["smolvlm"]
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows)
    mask = torch.ones(2, 3, 32, 32, dtype=torch.bool)
    mask[0, 0, 20:] = False
    with torch.no_grad():
        with (
            tokenprune.attach(model, "received-attention | evict(0.5)"),
            pytest.raises(UnsupportedError, match="tiles with padded pixels"),
        ):
            model(**inputs, pixel_attention_mask=mask)
        with tokenprune.attach(model, "uniform | evict(0.5)"):
            model(**inputs, pixel_attention_mask=mask)
