"""Account of a whole evaluation, added up from the reports of single prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenprune.report import Report


@dataclass
class Account:
    """Sums over prompts; every prompt counts once, when its answer is complete.

    Attributes:
        prompts: how many were answered, those without a picture among them.
        images: pictures (or videos) that were reduced.
        layers: visual tokens from an LLM layer on, by layer, of all pictures.
        cached: those of them whose prompts were cached; only of these a report has KV bytes.
        kv_bytes, kv_bytes_vanilla: number of bytes of the caches after the prefills of these
            prompts.
        latest: the report after the latest prompt.
    """

    prompts: int = 0
    images: int = 0
    layers: dict[int, int] = field(default_factory=dict)
    cached: int = 0
    kv_bytes: int = 0
    kv_bytes_vanilla: int = 0
    latest: Report = field(default_factory=Report)

    def add(self, report: Report) -> None:
        """Count one more prompt, after which the attachment reports this."""
        self.prompts += 1
        if report.calls > self.latest.calls:  # otherwise it brought no picture
            self.images += len(report.images)
            for layer, tokens in report.layers:
                self.layers[layer] = self.layers.get(layer, 0) + tokens
            self.cached += len(report.images) if report.kv_bytes_vanilla else 0
            self.kv_bytes += report.kv_bytes
            self.kv_bytes_vanilla += report.kv_bytes_vanilla
        self.latest = report

    def means(self) -> dict[str, float]:
        """Numbers per picture, for the results of the evaluation, of which there are some."""
        if not self.images:
            return {}
        means = {
            "visual_tokens_before": self.latest.tokens_before / self.images,
            "visual_tokens_after": self.latest.tokens_after / self.images,
            "selector_ms": 1000 * self.latest.selector_seconds / self.images,
        }
        if self.cached:
            means["kv_bytes"] = self.kv_bytes / self.cached
            means["kv_bytes_vanilla"] = self.kv_bytes_vanilla / self.cached
        return means

    def write(self, path: Path, about: Mapping[str, object]) -> None:
        """Write everything as JSON, after what it is `about`."""
        text = json.dumps(
            {
                **about,
                "prompts": self.prompts,
                "images": self.images,
                "tokens_before": self.latest.tokens_before,
                "tokens_after": self.latest.tokens_after,
                "tokens_by_layer": [
                    {"from_layer": layer, "tokens": tokens}
                    for layer, tokens in sorted(self.layers.items())
                ],
                "kv_bytes": self.kv_bytes if self.cached else None,
                "kv_bytes_vanilla": self.kv_bytes_vanilla if self.cached else None,
                "selector_seconds": self.latest.selector_seconds,
                "per_image": self.means(),
            },
            indent=2,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
