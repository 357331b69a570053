"""Signals of open_clip towers, against `need_weights=True` and torch's own attention function."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

import tokenprune
from support.open_clip_towers import (
    HEADS,
    LAYERS,
    PATCHES,
    TOWERS,
    WIDTH,
    WITH_CLS,
    WITH_POOL,
    blocks_of,
    coca,
    eva,
    maps,
    native,
    peaked,
    pictures,
    prefix_of,
    siglip,
)
from tokenprune import (
    AttachError,
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    Keys,
    PoolAttention,
    ReceivedAttention,
    ShapeError,
    Signal,
    UnsupportedError,
    observe,
)
from tokenprune.testing import TowerCase, parametrize_with_checks


def resolved(layers: int | tuple[int, ...], feature_layer: int) -> list[int]:
    if isinstance(layers, int):
        return list(range(feature_layer - layers + 1, feature_layer + 1))
    return [layer % LAYERS for layer in layers]


def by_definition(tower: nn.Module, inputs: dict[str, Any], signal: Signal) -> Tensor:
    """`signal` from full attention maps; features are those of the layer before the last."""
    every, front = maps(tower, inputs["x"]), prefix_of(tower)
    if isinstance(signal, PoolAttention):
        return every[LAYERS][:, :, 0, -PATCHES:]
    kinds = (ClsAttention, JointClsAttention, ReceivedAttention, GivenAttention)
    assert isinstance(signal, kinds)
    chosen = [every[layer] for layer in resolved(signal.layers, LAYERS - 2)]
    if isinstance(signal, ClsAttention):
        return torch.stack([each[:, :, 0, front:] for each in chosen], dim=1)
    if isinstance(signal, JointClsAttention):  # whole maps have the column of [CLS]
        row = torch.stack([each[:, :, 0] for each in chosen], dim=1).double().log()
        return (row.sum(2) / row.shape[2] ** 0.5).softmax(-1)[..., front:].float()
    axis = 2 if isinstance(signal, ReceivedAttention) else 3
    return torch.stack([each[:, :, front:, front:].mean(axis) for each in chosen], dim=1)


def features(tower: nn.Module, inputs: dict[str, Any]) -> Tensor:
    found = []
    block = blocks_of(tower)[LAYERS - 2]
    handle = block.register_forward_hook(lambda module, args, output: found.append(output))
    tower(inputs["x"])
    handle.remove()
    first = getattr(getattr(tower, "transformer", None), "batch_first", True)
    hidden = found[0] if first else found[0].transpose(0, 1)
    return hidden[:, prefix_of(tower) :]


def case(name: str) -> TowerCase:
    wanted: list[Signal] = [ReceivedAttention(layers=2), GivenAttention(layers=(-1, 0))]
    if name in WITH_CLS:
        wanted += [ClsAttention(layers=3), ClsAttention(layers=(-1, 0))]
        wanted += [JointClsAttention(layers=(-1, 0))]
    if name in WITH_POOL:
        wanted.append(PoolAttention())
    return TowerCase(
        name,
        build=TOWERS[name],
        inputs=lambda: {"x": pictures()},
        signals=wanted,
        features=features,
        oracle=by_definition,
        run=lambda tower, inputs: tower(inputs["x"]),
    )


@parametrize_with_checks([case(n) for n in ("native", "tokens_first", "coca", "eva02", "siglip")])
def test_contract(case: Any, check: Any) -> None:
    check(case)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_signals_are_exact_and_attention_is_peaked(name: str) -> None:
    tower, inputs, wanted = TOWERS[name](), {"x": pictures()}, case(name).signals
    with observe(tower, wanted) as seen:
        tower(inputs["x"])
        for signal in wanted:
            truth = by_definition(tower, inputs, signal)
            torch.testing.assert_close(seen.signals[signal], truth, rtol=1e-5, atol=1e-6)
            if isinstance(signal, ClsAttention):  # else a wrong row would go unnoticed
                assert float(truth.amax(-1).mean()) > 3 / PATCHES


REAL = {
    "ViT-B-32": lambda: _real("ViT-B-32"),
    "ViT-L-14": lambda: _real("ViT-L-14"),
    "coca_ViT-B-32": lambda: _real("coca_ViT-B-32"),
    "EVA02-B-16": lambda: _real_eva("eva02_base_patch16_clip_224"),
}


def _real(name: str) -> nn.Module:
    """The shapes of a model of open_clip, three blocks deep, with its own random weights."""
    config = open_clip.get_model_config(name)
    vision = CLIPVisionCfg(**{**config["vision_cfg"], "layers": 3})
    return _build_vision_tower(config["embed_dim"], vision).eval()


def _real_eva(name: str) -> nn.Module:
    tower: Any = TimmModel("test_vit", 512, image_size=224)
    tower.trunk = timm.create_model(name, depth=3, num_classes=0)
    tower.head = nn.Identity()
    return tower.eval()


@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_rows_of_real_shapes_equal_the_weights(name: str) -> None:
    tower, x = REAL[name](), pictures(1, 224)
    expected, weights = tower(x), maps(tower, x)
    wanted: list[Signal] = [ClsAttention(layers=3)]
    if name.startswith("coca"):
        wanted.append(PoolAttention())
    with observe(tower, wanted, feature_layer=-1) as seen:
        got = tower(x)
    same = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    assert all(torch.equal(a, b) for a, b in same)
    rows = torch.stack([each[:, :, 0, 1:] for each in weights[:3]], dim=1)
    torch.testing.assert_close(seen.signals[wanted[0]], rows, rtol=1e-5, atol=1e-7)
    if len(wanted) > 1:
        pooled = weights[3][:, :, 0, 1:]
        torch.testing.assert_close(seen.signals[wanted[1]], pooled, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["native", "tokens_first", "qk_norm", "eva", "eva02", "siglip"])
@torch.no_grad()
def test_keys_are_those_of_the_block(name: str) -> None:
    tower, inputs = TOWERS[name](), []
    attention: Any = blocks_of(tower)[1].attn
    handle = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with observe(tower, [Keys(layer=1)]) as seen:
        tower(pictures())
    handle.remove()
    x = inputs[0].transpose(0, 1) if name == "tokens_first" else inputs[0]
    if hasattr(attention, "in_proj_weight"):
        key = x @ attention.in_proj_weight[WIDTH : 2 * WIDTH].T
        key = key + attention.in_proj_bias[WIDTH : 2 * WIDTH]
    elif attention.qkv is None:
        key = attention.k_proj(x)
    else:  # EVA's bias of keys is zero
        key = attention.qkv(x)[:, :, WIDTH : 2 * WIDTH]
    key = key.unflatten(2, (HEADS, -1)).transpose(1, 2)[:, :, prefix_of(tower) :]
    key = attention.ln_k(key) if name == "qk_norm" else key
    torch.testing.assert_close(seen.signals[Keys(layer=1)], key, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reduced_tokens_for_any_model() -> None:
    tower = TOWERS["native"]()
    strategy = tokenprune.parse("cls-attention(layers=2) | evict(9)").strategy
    with observe(tower, strategy.signals) as seen:
        tower(pictures())
        kept = strategy(seen.tokens, seen.signals)
    assert kept.tokens.features.shape == (3, 9, WIDTH)
    by_row = maps(tower, pictures())
    scores = (by_row[2] + by_row[3])[:, :, 0, 1:].mean(1)
    assert torch.equal(kept.tokens.patches, scores.topk(9).indices.sort().values)


@pytest.mark.parametrize("name", ["native", "eva02", "qk_norm"])
@torch.no_grad()
def test_bfloat16_and_autocast(name: str) -> None:
    wanted = ClsAttention(layers=2)
    truth = by_definition(TOWERS[name](), {"x": pictures()}, wanted)
    tower = copy.deepcopy(TOWERS[name]()).bfloat16()
    x = pictures().bfloat16()
    expected = tower(x)
    with observe(tower, [wanted]) as seen:
        assert torch.equal(tower(x), expected)
        rows = seen.signals[wanted]
    assert rows.dtype == torch.float32
    assert float((rows - truth).abs().mean()) < 0.2 / PATCHES
    plain = TOWERS[name]()
    with torch.autocast("cpu", torch.bfloat16), observe(plain, [wanted]) as seen:
        plain(pictures())
        assert float((seen.signals[wanted] - truth).abs().mean()) < 0.2 / PATCHES


def test_signals_carry_no_gradient_and_training_goes_on() -> None:
    tower = copy.deepcopy(TOWERS["native"]()).train()
    tower(pictures()).sum().backward()
    expected = [p.grad.clone() for p in tower.parameters()]
    tower.zero_grad()
    tower.set_grad_checkpointing(True)  # type: ignore[operator]
    with observe(tower, [ClsAttention(layers=2)]) as seen:
        tower(pictures()).sum().backward()
        assert not seen.signals[ClsAttention(layers=2)].requires_grad
        assert not seen.tokens.features.requires_grad
    for parameter, grad in zip(tower.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@torch.no_grad()
def test_forward_intermediates_is_not_observed_but_works() -> None:
    tower: Any = TOWERS["native"]()
    expected = tower.forward_intermediates(pictures())["image_intermediates"]
    with observe(tower, [ClsAttention(layers=2)]) as seen:
        got = tower.forward_intermediates(pictures())["image_intermediates"]
        assert not seen.ready
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_a_pass_that_failed_is_forgotten() -> None:
    tower: Any = TOWERS["native"]()
    last = blocks_of(tower)[-1]
    with observe(tower, [Keys(layer=1)]) as seen:
        tower(pictures(2))
        handle = last.register_forward_pre_hook(lambda module, args: args[0].no_such_thing)
        with pytest.raises(AttributeError):
            tower(pictures())
        handle.remove()
        assert not seen.running
        assert not seen.ready  # what was seen before is not taken for this pass
        tower(pictures(1))
        assert seen.tokens.features.shape[0] == 1


def test_a_tower_without_cls_names_what_it_gives() -> None:
    says = "TimmModel cannot give ClsAttention; it gives .*Keys, PoolAttention, ReceivedAttention"
    with (
        pytest.raises(UnsupportedError, match=says),
        observe(TOWERS["siglip"](), [ClsAttention(layers=1)]),
    ):
        pass


@pytest.mark.parametrize("name", ["native", "eva", "averaged"])
def test_a_tower_without_pool_names_what_it_gives(name: str) -> None:
    says = "cannot give PoolAttention; it gives .*Keys, ReceivedAttention"
    with pytest.raises(UnsupportedError, match=says), observe(TOWERS[name](), [PoolAttention()]):
        pass


@pytest.mark.parametrize(
    "options", [{"attentional_pool": "parallel", "embed_dim": WIDTH}, {"pool_type": "avg"}]
)
def test_other_pools_of_coca(options: dict[str, Any]) -> None:
    tower = coca(**options)
    if "pool_type" in options:  # its output is a mean of all queries but the first
        with (
            pytest.raises(UnsupportedError, match="cannot give PoolAttention"),
            observe(tower, [PoolAttention()]),
        ):
            pass
        return
    with torch.no_grad(), observe(tower, [PoolAttention()]) as seen:
        tower(pictures())
        contrastive = maps(tower, pictures())[LAYERS + 1]
        row = contrastive[:, :, 0, 1:]
        torch.testing.assert_close(seen.signals[PoolAttention()], row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("trunk", "says"),
    [
        ("test_convnext", "TimmModel with ConvNeXt is no plain ViT: ConvNeXt has no sequence"),
        ("swin_tiny_patch4_window7_224", "TimmModel with SwinTransformer is no plain ViT"),
        ("vit_relpos_small_patch16_224", "RelPosAttention has parts that .*know .rel_pos."),
    ],
)
def test_other_trunks_are_refused_by_name(trunk: str, says: str) -> None:
    tower: Any = TOWERS["siglip"]()
    held = tower.trunk
    tower.trunk = timm.create_model(trunk, num_classes=0)
    try:
        with pytest.raises(UnsupportedError, match=says), observe(tower, []):
            pass
        with pytest.raises(UnsupportedError, match=says):
            tokenprune.attach(tower, "random | evict(3) @ after-layer(1)")
    finally:
        tower.trunk = held


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_resnets_and_scripted_towers_are_refused_by_name() -> None:
    from open_clip.modified_resnet import ModifiedResNet

    resnet = ModifiedResNet((1, 1, 1, 1), 16, 4, image_size=32, width=8)
    with (
        pytest.raises(UnsupportedError, match="ModifiedResNet.*VisionTransformer"),
        observe(resnet, []),
    ):
        pass
    scripted = torch.jit.script(native(layers=1))
    with (
        pytest.raises(UnsupportedError, match="scripted models run without hooks"),
        observe(scripted, []),
    ):
        pass
    with pytest.raises(UnsupportedError, match="scripted models run without hooks"):
        tokenprune.attach(scripted, "random | evict(3) @ after-layer(1)")


def test_weights_that_are_not_applied_as_they_are() -> None:
    class Adapted(nn.Linear):
        pass

    tower: Any = eva(depth=2)
    tower.trunk.blocks[0].attn.qkv = Adapted(WIDTH, 3 * WIDTH, bias=False)
    with (
        pytest.raises(UnsupportedError, match="which Adapted may not apply as they are"),
        observe(tower, []),
    ):
        pass


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_patches_dropped_at_random_are_refused_in_training(library: str) -> None:
    tower = native(patch_dropout=0.5) if library == "open_clip" else siglip(patch_drop_rate=0.5)
    with observe(tower, [Keys(layer=-1)]) as seen:
        tower(pictures())
        assert seen.tokens.features.shape[1] == PATCHES
        tower.train()
        with pytest.raises(UnsupportedError, match=r"drops patches at random.*model.eval"):
            tower(pictures())
        tower.eval()
        tower(pictures())


def test_layers_that_do_not_exist() -> None:
    with (
        pytest.raises(ShapeError, match="5 layers"),
        observe(TOWERS["native"](), [Keys(layer=0)], feature_layer=5),
    ):
        pass
    with (
        pytest.raises(ShapeError, match="only 4 end at layer 3"),
        observe(TOWERS["native"](), [ClsAttention(layers=5)]),
    ):
        pass


def test_an_observed_tower_is_not_copied() -> None:
    tower = native(layers=1)
    with observe(tower, [Keys(layer=-1)], feature_layer=-1):
        with pytest.raises(AttachError, match="detach before copying"):
            copy.deepcopy(tower)
        with pytest.raises(AttachError, match="detach before pickling"):
            pickle.dumps(tower)
    assert isinstance(copy.deepcopy(tower), type(tower))


def test_peaked_weights_are_the_same_every_time() -> None:
    one, other = (peaked(native(layers=1)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
