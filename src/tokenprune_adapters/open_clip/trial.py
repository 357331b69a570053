"""Towers of open_clip, reduced after one of their blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.trial import Answer, Cut, Questions, Trial

from ..kit.budget_by_hand import clear_budget, kept
from ..kit.peaked_weights import peaked


class Tower:
    """Two pictures for a tower that is `visual` of an open_clip model, with [CLS] in front.

    Args:
        tower: vanilla; its blocks take the batch first.
    """

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        trunk = getattr(tower, "trunk", None)
        self.blocks = tower.transformer.resblocks if trunk is None else trunk.blocks
        self.prefix = 1 if trunk is None else trunk.num_prefix_tokens
        self.start = len(self.blocks) // 2
        weight = next(tower.parameters())
        noise = torch.randn(2, 3, *tower.image_size, generator=torch.Generator().manual_seed(1))
        self.pixels = noise.to(weight.device, weight.dtype)

    def questions(self) -> Questions:
        """A cut after half of the blocks, and then none."""
        with torch.no_grad():
            rows, plain = self._cls_rows(), self.ask().logits
        groups = [torch.arange(self.prefix, rows.shape[1], device=rows.device)]
        keep = clear_budget(rows[:, self.prefix :], rows.dtype)

        def by_hand(text: Tensor, shift: int) -> Tensor:
            return self._run(torch.stack([kept(groups, row, keep, shift) for row in rows]))

        spec = f"cls-attention(layers=1) | evict({keep}) @ after-layer({self.start})"
        return Questions(
            self.ask,
            (
                Cut(f"after block {self.start}", spec, by_hand),
                Cut("detached", "", lambda text, shift: plain),
            ),
        )

    def ask(self) -> Answer:
        """Embeddings of both pictures; there is no text."""
        made = self.tower(self.pixels)
        made = made[0] if isinstance(made, tuple) else made
        return Answer(torch.empty(len(made), 0, dtype=torch.int64), made[:, None])

    def _run(self, slots: Tensor) -> Tensor:
        """What comes out when blocks from the start on get the tokens `(pictures, kept)` alone."""

        def cut(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            return (x.gather(1, slots[:, :, None].expand(-1, -1, x.shape[2])), *args[1:])

        handle = self.blocks[self.start].register_forward_pre_hook(cut)
        try:
            return self.ask().logits
        finally:
            handle.remove()

    def _cls_rows(self) -> Tensor:
        """`(pictures, tokens)` attention of [CLS] in the block before the cut, head mean."""
        block, inputs = self.blocks[self.start - 1], []
        handle = block.register_forward_pre_hook(lambda part, args: inputs.append(args[0]))
        try:
            self.ask()
        finally:
            handle.remove()
        if hasattr(block, "ln_1"):  # open_clip's own
            x = block.ln_1(inputs[0])
            maps: Tensor = block.attn(x, x, x, need_weights=True)[1]
            return maps[:, 0]
        split = "batch tokens (part heads channels) -> part batch heads tokens channels"
        made = block.attn.qkv(block.norm1(inputs[0]))
        query, key, _ = rearrange(made, split, part=3, heads=block.attn.num_heads)
        logits = query[:, :, :1] @ key.mT / query.shape[-1] ** 0.5
        row: Tensor = logits.float().softmax(-1).mean(1)[:, 0]
        return row


def _native() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    sizes = (48, 8, 32, 4, 4, 2.0)  # picture, patch, channels, layers, heads, times wider in MLPs
    return peaked(VisionTransformer(*sizes, output_dim=16))


def _timm() -> nn.Module:
    from open_clip.timm_model import TimmModel

    return peaked(TimmModel("test_vit", 16, image_size=64, pool="token"))


def trials() -> Iterable[Trial]:
    """A ViT of open_clip's own, and one of timm."""
    for name, build in (("VisionTransformer", _native), ("TimmModel", _timm)):
        yield Trial(
            f"{name} of open_clip", "open_clip", build, lambda tower: Tower(tower).questions()
        )
