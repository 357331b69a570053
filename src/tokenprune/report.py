"""What an attached model did: tokens per image, selector time, KV bytes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .errors import AttachError
from .strategy import Reduction


@dataclass(frozen=True)
class ImageReport:
    """Visual tokens of one image (or crop) before and after reduction."""

    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """Numbers of an attachment.

    Attributes:
        images: visual tokens of each image of the latest call, in order, before the first stage and
            after the last.
        layers: the latest call's visual tokens, all images together, in the LLM (or in a tower that
            is itself the model): pairs of a layer and the tokens from that layer on.
        kept: for each image of the latest reduction, where the kept tokens come from: patches, or
            crop (or frame) times patches per crop plus patch; see `Reduction.places`.
        calls: batches of images reduced since attaching.
        tokens_before: visual tokens of all those calls, before the first stage.
        tokens_after: the same, after the last.
        selector_seconds: time spent scoring, deciding and applying, over all calls.
        kv_bytes: bytes of KV cache after the latest prefill, as it was stored; 0, like the next,
            where nothing was dropped or nothing is cached.
        kv_bytes_vanilla: what the unpruned model would have stored for the same prompt.
    """

    images: tuple[ImageReport, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()
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
    """Where an adapter writes what it did; safe to share between threads."""

    _report: Report = field(default_factory=Report)
    _last: Reduction | None = None
    _pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _joining: threading.local = field(default_factory=threading.local)

    def reduced(self, reduction: Reduction, before: tuple[int, ...]) -> None:
        """Note a reduction, before the LLM, of images with `before` visual tokens each."""
        self.decided(reduction)
        self.counted(before, {0: reduction.plan.lengths})

    def decided(self, reduction: Reduction) -> None:
        """Note a reduction as the latest, without counting tokens; KV bytes are not known yet."""
        with self._lock:
            self._last = reduction
            self._update(kv_bytes=0, kv_bytes_vanilla=0)

    def counted(self, before: tuple[int, ...], after: Mapping[int, tuple[int, ...]]) -> None:
        """Note the visual tokens of a batch of images: one call (but see `same_call`).

        Args:
            before: of each image as the vision tower made it.
            after: of each image from an LLM layer on, by layer, ascending; 0 is the LLM's input.
        """
        *_, last = after.values()
        images = tuple(ImageReport(b, a) for b, a in zip(before, last, strict=True))
        layers = {layer: sum(tokens) for layer, tokens in after.items()}
        with self._lock:
            joins = getattr(self._joining, "yes", False)
            if joins:
                images = self._report.images + images
                layers = {layer: n + layers[layer] for layer, n in self._report.layers}
            self._update(
                images=images,
                layers=tuple(layers.items()),
                calls=self._report.calls + (not joins),
                tokens_before=self._report.tokens_before + sum(before),
                tokens_after=self._report.tokens_after + sum(last),
            )

    @contextmanager
    def same_call(self) -> Iterator[None]:
        """What this thread counts in here joins the call that was counted last.

        For models that reduce the images of one batch in parts, such as pictures and videos; each
        part must count the same layers.
        """
        self._joining.yes = True
        try:
            yield
        finally:
            self._joining.yes = False

    def cached(self, stored: int, vanilla: int) -> None:
        """Note the bytes of the KV cache after a prefill."""
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
            if self._last is None:
                return self._report
            tokens = self._last.tokens
            rows = zip(tokens.positions.tolist(), tokens.mask.tolist(), strict=True)
            kept = tuple(tuple(itertools.compress(places, mask)) for places, mask in rows)
            return replace(self._report, kept=kept)

    @property
    def last(self) -> Reduction:
        """The latest reduction.

        Raises:
            AttachError: no image has been reduced yet.
        """
        with self._lock:
            if self._last is None:
                raise AttachError("no image has been reduced yet: run the attached model first")
            return self._last

    def _settle(self, wait: bool) -> None:
        """Add up the timings that are in, or all of them."""
        while self._pending and (wait or self._pending[0][1].query()):  # type: ignore[no-untyped-call]
            start, end = self._pending.pop(0)
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
            self._update(selector_seconds=self._report.selector_seconds + seconds)

    def _update(self, **changes: Any) -> None:
        self._report = replace(self._report, **changes)
