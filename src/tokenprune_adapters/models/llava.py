"""LLaVA-1.5 of transformers (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokenprune.adapter import ModelAdapter, NotCopyable, Observation, Removable
from tokenprune.errors import UnsupportedError
from tokenprune.placement import AfterLayer, BeforeLLM, Placement, Positions
from tokenprune.report import Record
from tokenprune.signals import ClsAttention, LastQueryAttention, Signal, TextQueryAttention
from tokenprune.strategy import Stage

from ..llms.images import Images
from ..llms.inside import ReduceInside, refuse_candidates
from ..llms.shorten import IMAGES, ShortenPrompts, check_llm
from ..llms.store import SignalStore
from ..projection import ReduceBeforeProjector
from ..versions import check_transformers, expanded_images_guard, lost_images_guard
from .parts import (
    before_llm,
    check_budgets,
    check_select_strategy,
    feature_layer,
    hide_marks,
    inside_llm,
    tower_adapter,
)


class LlavaAdapter(ModelAdapter):
    """Reduces before the projector, after decoder layers, or both.

    The language model computes and caches, from each place on, the tokens kept there.
    """

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        if not isinstance(placement, (BeforeLLM, AfterLayer)):
            raise UnsupportedError(
                f"{type(model).__name__} does not offer {placement!r}; it offers 'before-llm' and "
                "'after-layer(2)' (any layer)"
            )
        check_transformers()
        core: Any = model.model
        check_llm(core.language_model)
        provided = tower_adapter(core.vision_tower).provides(core.vision_tower)
        check_select_strategy(core, has_cls=ClsAttention in provided)
        if isinstance(placement, AfterLayer):
            return provided | {LastQueryAttention, TextQueryAttention}
        return provided

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        core: Any = model.model
        tower, llm = core.vision_tower, core.language_model
        check_budgets(stages)
        before = before_llm(stages)
        inside = inside_llm(stages, len(llm.layers))
        of_tower = {
            signal
            for stage in inside.values()
            for signal in stage.strategy.signals
            if not isinstance(signal, (LastQueryAttention, TextQueryAttention))
        }
        store = SignalStore(core.get_input_embeddings().weight.dtype)
        if before is not None or inside:
            observation = Observation()
            wanted = of_tower | (before.strategy.signals if before is not None else set())
            yield from tower_adapter(tower).install(
                tower, frozenset(wanted), observation, feature_layer(core.config)
            )
            yield from ReduceBeforeProjector(
                before.strategy if before is not None else None,
                observation,
                record,
                store if inside else None,
            ).install(core.multi_modal_projector)
        if before is not None:
            yield core.register_forward_hook(hide_marks)
        if inside:
            yield core.register_forward_pre_hook(_FindImages(core).before, with_kwargs=True)
        positions: Positions = "reindexed"
        if before is not None:
            assert isinstance(before.placement, BeforeLLM)
            positions = before.placement.positions
        to_layers = bool(inside) or positions == "original"
        yield from ShortenPrompts(positions, record, tuple(inside), to_layers).install(llm)
        if to_layers:
            hooks = ReduceInside(llm, inside, store, record)
            yield from hooks.install()
            if hooks.watched:
                yield model.register_forward_pre_hook(refuse_candidates, with_kwargs=True)
        yield from expanded_images_guard(core)
        yield from lost_images_guard(core)


class _FindImages(NotCopyable):
    """Tells the language model which slots of a prompt hold image features."""

    def __init__(self, core: Any) -> None:
        vision = core.config.vision_config
        self.tokens = (vision.image_size // vision.patch_size) ** 2

    def before(
        self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise UnsupportedError(
                "reduction after a layer finds visual tokens by their placeholders in input_ids; "
                "pass input_ids instead of inputs_embeds"
            )
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        # A chunk of a prompt comes with nothing but the features that it holds.
        if encoded is not None and getattr(encoded, "last_hidden_state", None) is None:
            raise UnsupportedError(
                "a stage after a layer needs to see the prompt as a whole; chunked prefill cannot "
                "be combined with it, drop prefill_chunk_size"
            )
        if kwargs.get("pixel_values") is not None or encoded is not None:
            kwargs[IMAGES] = Images.of(ids == core.config.image_token_id, self.tokens)
        return args, kwargs
