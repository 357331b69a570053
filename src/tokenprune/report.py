"""Report of an attached model: tokens per image, selector time, bytes of the KV cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from .call_reductions import Part, joined, kept_of
from .errors import AttachError, ShapeError
from .kept_patches import Kept, Origin
from .strategy import Reduction

Origins: TypeAlias = Sequence[Origin | None]
"""What each row of a reduction shows; none for a picture in each row."""


@dataclass(frozen=True)
class ImageReport:
    """Visual tokens of one picture or video before and after reduction."""

    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """Report of an attachment, in numbers.

    A call is one batch of prompts with pictures or videos. Copies of a prompt, which `generate`
    makes for beams and for `num_return_sequences`, are not counted.

    Attributes:
        images: visual tokens of each picture and video of the latest call, before the first stage
            and after the last: pictures first and then videos, each in the order in which they
            were given.
        layers: the latest call's visual tokens, all pictures and videos together, in the LLM (or in
            a tower that is itself the model): pairs of a layer and the tokens from that layer on.
        kept: where the tokens that are left of each picture and video come from, in the order of
            `images`.
        calls: calls since attaching.
        tokens_before: visual tokens of all those calls, before the first stage.
        tokens_after: the same, after the last.
        selector_seconds: time spent scoring, deciding and applying, over all calls.
        kv_bytes: bytes of KV cache after the latest prefill, as it was stored, also of a prompt of
            text alone; 0, like the next, where nothing is cached.
        kv_bytes_vanilla: what the unpruned model would have stored for the same prompt.
    """

    images: tuple[ImageReport, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()
    kept: tuple[Kept, ...] = ()
    calls: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    selector_seconds: float = 0.0
    kv_bytes: int = 0
    kv_bytes_vanilla: int = 0

    @property
    def kv_bytes_saved(self) -> int:
        """KV bytes that the latest prefill did not have to store."""
        return self.kv_bytes_vanilla - self.kv_bytes

    def __str__(self) -> str:
        if not self.calls:
            return "no image has been reduced yet"
        images = ", ".join(f"{image.before} -> {image.after}" for image in self.images)
        milliseconds = 1000 * self.selector_seconds / self.calls
        lines = [
            f"visual tokens   {images}",
            f"selector time   {milliseconds:.2f} ms per call ({self.calls} calls)",
        ]
        if len(self.layers) > 1:
            steps = ", ".join(f"{tokens} from layer {layer}" for layer, tokens in self.layers)
            lines.append(f"by layer        {steps}")
        if self.kv_bytes_vanilla:
            lines.append(
                f"KV cache        {_bytes(self.kv_bytes)} of {_bytes(self.kv_bytes_vanilla)}, "
                f"{_bytes(self.kv_bytes_saved)} saved"
            )
        return "\n".join(lines)


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


@dataclass
class Record:
    """Record in which an adapter writes what it did; safe to share between threads.

    Each row of a reduction shows a picture, unless `origins` say otherwise: that it is a video, or
    a crop or frame of something; None marks a row as a copy of another one, which is not reported.
    """

    _report: Report = field(default_factory=Report)
    _parts: tuple[Part, ...] = ()
    _pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: _Local = field(default_factory=lambda: _Local())

    def reduced(self, reduction: Reduction, before: tuple[int, ...], origins: Origins = ()) -> None:
        """Note a reduction, before the LLM, of rows with `before` visual tokens each."""
        self.decided(reduction, origins)
        self.counted(before, {0: reduction.plan.lengths}, origins)

    def decided(self, reduction: Reduction, origins: Origins = ()) -> None:
        """Note a reduction of a call; it is shown when its tokens are counted, if nothing fails."""
        mine = self._local
        earlier = mine.parts if mine.joining else ()
        shown = [origin for part in earlier for origin in part.origins]
        part = Part(reduction, _numbered(origins, reduction.plan.anchors.shape[0], shown))
        mine.parts, mine.kv_bytes = (*earlier, part), (0, 0)

    def counted(
        self,
        before: tuple[int, ...],
        after: Mapping[int, tuple[int, ...]],
        origins: Origins = (),
    ) -> None:
        """Note the visual tokens of the rows of a call (but see `same_call`), and show it.

        Args:
            before: number of tokens of each row as the vision tower made it.
            after: number of tokens of each row from an LLM layer on, by layer, ascending; 0 is the
                LLM's input.
            origins: what each row shows; of several rows of one picture, tokens are added up.
        """
        mine = self._local
        rows = mine.rows if mine.joining else ()
        rows += tuple(
            _Row(origin, tokens, dict(zip(after, left, strict=True)))
            for origin, tokens, *left in zip(
                _numbered(origins, len(before), [row.origin for row in rows]),
                before,
                *after.values(),
                strict=True,
            )
            if origin is not None
        )
        added = rows[len(mine.rows) :] if mine.joining else rows
        calls = 0 if mine.joining else 1
        images: dict[tuple[bool, int], ImageReport] = {}
        for row in rows:
            one = images.get(row.origin.order, ImageReport(0, 0))
            images[row.origin.order] = ImageReport(one.before + row.before, one.after + row.last)
        layers = {layer: sum(row.after[layer] for row in rows) for layer in after}
        mine.rows = rows
        stored, vanilla = mine.kv_bytes
        with self._lock:
            self._parts = mine.parts or self._parts
            self._update(
                kv_bytes=stored,
                kv_bytes_vanilla=vanilla,
                images=tuple(images[order] for order in sorted(images)),
                layers=tuple(layers.items()),
                calls=self._report.calls + calls,
                tokens_before=self._report.tokens_before + sum(row.before for row in added),
                tokens_after=self._report.tokens_after + sum(row.last for row in added),
            )

    @contextmanager
    def same_call(self) -> Iterator[None]:
        """What this thread notes in here joins the call that it noted last.

        For models that reduce the images of one batch in parts, such as pictures and videos; each
        part must count the same layers.
        """
        self._local.joining = True
        try:
            yield
        finally:
            self._local.joining = False

    def cached(self, stored: int, vanilla: int) -> None:
        """Note the bytes of the KV cache after a prefill."""
        self._local.kv_bytes = stored, vanilla
        with self._lock:
            self._update(kv_bytes=stored, kv_bytes_vanilla=vanilla)

    @contextmanager
    def selecting(self, device: torch.device) -> Iterator[None]:
        """Time the selector; on a GPU by events, which cost no synchronisation."""
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            try:
                yield
            finally:
                end.record()
                with self._lock:
                    self._pending.append((start, end))
                    self._settle(wait=False)
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            with self._lock:
                self._update(selector_seconds=self._report.selector_seconds + seconds)

    @property
    def report(self) -> Report:
        """The numbers so far; waits for the GPU where timings are still out."""
        with self._lock:
            self._settle(wait=True)
            return replace(self._report, kept=kept_of(self._parts))

    @property
    def last(self) -> Reduction:
        """The latest reduction, its rows in the order of the report and without copies.

        Raises:
            AttachError: no image has been reduced yet.
        """
        with self._lock:
            if not self._parts:
                raise AttachError("no image has been reduced yet: run the attached model first")
            return joined(self._parts)

    def _settle(self, wait: bool) -> None:
        """Add up the timings that are in, or all of them."""
        while self._pending and (wait or self._pending[0][1].query()):  # type: ignore[no-untyped-call]
            start, end = self._pending.pop(0)
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
            self._update(selector_seconds=self._report.selector_seconds + seconds)

    def _update(self, **changes: Any) -> None:
        self._report = replace(self._report, **changes)


@dataclass(frozen=True)
class _Row:
    """Visual tokens of a row: `before`, and from each layer on."""

    origin: Origin
    before: int
    after: dict[int, int]

    @property
    def last(self) -> int:
        """Tokens after the last stage."""
        *_, last = self.after.values()
        return last


class _Local(threading.local):
    """Latest call of a thread, which parts that come in `same_call` join."""

    joining: bool = False
    parts: tuple[Part, ...] = ()
    rows: tuple[_Row, ...] = ()
    kv_bytes: tuple[int, int] = (0, 0)


def _numbered(
    origins: Origins, rows: int, earlier: Sequence[Origin | None]
) -> tuple[Origin | None, ...]:
    """`origins`, or for none a picture for each row, counted after the `earlier` ones."""
    if origins and len(origins) != rows:
        raise ShapeError(f"origins must tell of each of {rows} rows, got {len(origins)} origins")
    first = sum(origin is not None for origin in earlier)
    return tuple(origins) or tuple(Origin(first + row) for row in range(rows))
