"""Guard against candidates of assisted decoding behind a prompt whose text ranks its tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable

from .checks import check_ranking
from .names import calls_of


class RefuseCandidates(NotCopyable):
    """Hook before a whole model whose stages rank by the text of the prompt.

    In the first pass of assisted decoding and prompt lookup, candidates stand behind the prompt,
    and nothing tells where it ends but how many logits are asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        check_ranking(model)
        self.calls = calls_of(model)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.calls(args, kwargs)
        kept = call.kept_logits
        images = call.pixels is not None or call.videos is not None or call.encoded
        if images and call.cache is not None and isinstance(kept, int) and kept > 1:
            raise UnsupportedError(
                f"logits_to_keep={kept} in a prefill says that {kept - 1} candidates of assisted "
                "decoding or prompt lookup stand behind the prompt, so its last token cannot be "
                "found to rank by; decode without them, or rank by cls-attention"
            )
