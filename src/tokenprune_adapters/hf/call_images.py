"""Images of a call of a model, whose pictures may have been encoded before."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.budget import Per
from tokenprune.errors import MissingSignalError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.kept_patches import Origin
from tokenprune.signals import Signals
from tokenprune.untraced import untraced

from .anatomy import Anatomy
from .behind_projector import features_of, flat_of
from .family import Encoded, Sight
from .llm.image_slots import Images
from .llm.signal_cache import Held, SignalCache
from .names import Call, Hooked, Signature, calls_of
from .outputs import Output
from .picture_rows import PictureRow, rows_of
from .tiles import Joined, Tiles

NOTED = "tokenprune_crops"
"""Attribute of what was encoded: how many crops or frames each picture or video has."""
_JOINED = "tokenprune_joined"
"""Attribute of what was encoded, in one call of the model: tiles as the rows of their pictures."""


@dataclass(eq=False)
class CallImages(NotCopyable):
    """Finder of images and videos in calls of one model.

    Attributes:
        parts: the parts of the model.
        sights: the kinds of picture that it takes.
        later: where is found what is known of rows; None where no stage is inside the LLM.
        per: what budgets are for.
        tiles: where tiles wait for the prompts that tell their pictures; None where a row is what
            has a budget.
    """

    parts: Anatomy
    sights: tuple[Sight, ...]
    later: SignalCache | None
    per: Per = "image"
    tiles: Tiles | None = None

    def install(self) -> Iterator[Removable]:
        """Yield the handle of what reduces pictures whose tiles wait."""
        if self.tiles is not None:
            hook = _Join(self, self.tiles)
            yield self.parts.core.register_forward_pre_hook(hook.before, with_kwargs=True)

    @untraced
    def encode_now(self, call: Call) -> None:
        """Encode what the model would encode in a call of it, a moment earlier.

        So stages inside the language model see the features, as they do where `generate` has
        encoded them.
        """
        if call.encoded:
            return
        encoded: dict[str, Any] = {}
        for sight in self.sights:
            if sight.pixels.of(call) is not None:
                method = getattr(self.parts.core, sight.encode)
                taken = Signature.of(method).names & call.kwargs.keys()
                encoded[sight.kind] = method(
                    **{name: call.kwargs[name] for name in taken}, return_dict=True
                )
                sight.pixels.__set__(call, None)
        if encoded:
            call.encoded = encoded

    def find(self, ids: Tensor, call: Call) -> Images:
        """The images and videos of a call of the model, in the order of its prompts."""
        encoded = call.encoded or {}
        seen = [
            (sight, self.parts.placeholders(ids, sight.kind), self._rows(sight, call, output))
            for sight in self.sights
            if (output := encoded.get(sight.kind)) is not None
        ]
        (sight, placeholders, rows), *videos = seen
        if not videos and _alike(sight, rows):
            return Images.alike(placeholders, len(rows), len(rows[0].slots))
        for _, of_videos, theirs in videos:
            placeholders = placeholders | of_videos
            rows = _in_order(of_videos[placeholders].tolist(), rows, theirs)
        return Images.of(placeholders, [row.patches for row in rows], [row.origin for row in rows])

    def _rows(self, sight: Sight, call: Call, output: Any) -> list[PictureRow]:
        """The rows of what was encoded, in a call of the model that takes it."""
        joined: list[PictureRow] | None = getattr(output, _JOINED, None)
        if joined is not None:
            return joined
        _, _, elements = flat_of(Output(output).features)
        noted = getattr(output, NOTED, None)
        encoded = Encoded(self.parts.core, call, elements, self.per, noted)
        patches = sight.told(encoded)
        crops = None if sight.crops is None else sight.crops(encoded)
        if patches is None or (crops is None and sight.crops is not None):
            assert self.later is not None
            held = self.later.held(elements)
            if held is not None:
                patches, crops = [each.patches for each in held], [each.crops for each in held]
        if patches is None:
            raise MissingSignalError(
                "image features did not come from the attached model, so it is not known which "
                "patches they hold; pass pixel_values, not features of your own"
            )
        return rows_of(sight, encoded, patches, crops)

    @untraced
    def join(self, tiles: Tiles, call: Call) -> None:
        """Reduce pictures, of which a call brings tiles and prompts."""
        self.encode_now(call)
        encoded = dict(call.encoded or {})
        for sight in self.sights:
            if (raw := encoded.get(sight.kind)) is None:
                continue
            if call.ids is None:
                raise UnsupportedError(
                    "which tiles are of one picture is told by their placeholders in input_ids; "
                    "pass input_ids instead of inputs_embeds, or give budgets per='crop'"
                )
            if Output(raw).last is None:
                raise UnsupportedError(
                    "a chunk of a prompt does not tell which tiles are of one picture; drop "
                    "prefill_chunk_size, or give budgets per='crop'"
                )
            joined = tiles.join(sight, call.ids, raw, self._rows(sight, call, raw))
            if joined is None:  # of which the model complains
                continue
            raw, known = tiles(sight, raw, joined)
            if self.later is not None:
                self._put(raw, joined, known)
            encoded[sight.kind] = raw = copy.copy(raw)
            setattr(raw, _JOINED, joined.rows)
        call.encoded = encoded

    def _put(self, raw: Any, joined: Joined, known: Signals) -> None:
        """Leave what is known of pictures for `find`, once for each that was given."""
        assert self.later is not None
        given = [n for n, origin in enumerate(joined.origins) if origin is not None]
        if len(given) < len(joined.origins):
            known = Signals({each: torch.stack([x[n] for n in given]) for each, x in known.items()})
        features = features_of(raw, joined.rows)
        held = [Held(joined.rows[n].patches, 1) for n in given]
        self.later.put([features[n] for n in given], known, held)


class _Join(NotCopyable):
    """Hook before a model whose pictures are reduced when it is called.

    Args:
        images: finds them.
        tiles: what waits.
    """

    def __init__(self, images: CallImages, tiles: Tiles) -> None:
        self.images = images
        self.tiles = tiles
        self.calls = calls_of(images.parts.core)

    def before(
        self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hooked | None:
        call = self.calls(args, kwargs)
        if call.pixels is None and not call.encoded:
            return None
        self.images.join(self.tiles, call)
        return call.hooked


def _alike(sight: Sight, rows: Sequence[PictureRow]) -> bool:
    """Whether all rows are pictures with as many slots, each of which holds a patch."""
    whole = all(row.origin == Origin(number) for number, row in enumerate(rows))
    return whole and sight.patches is None and len({len(row.slots) for row in rows}) == 1


def _in_order(
    of_video: Sequence[bool], pictures: list[PictureRow], videos: list[PictureRow]
) -> list[PictureRow]:
    """Rows of pictures and videos in the order in which they stand in prompts.

    Args:
        of_video: for each placeholder of either, in order, whether it is of a video.
        pictures: in order.
        videos: in order.
    """
    left = {False: iter(pictures), True: iter(videos)}
    rows: list[PictureRow] = []
    start = 0
    while start < len(of_video):
        row = next(left[of_video[start]], None)
        if row is None:  # more placeholders than features, of which the model complains
            break
        rows.append(row)
        start += len(row.slots)
    return rows
