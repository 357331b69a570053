"""lmms-eval's `video_llava` (Video-LLaVA of transformers, on videos), compressed."""

from __future__ import annotations

from lmms_eval.models.simple.video_llava import VideoLLaVA

from .mixin import Pruned


class VideoLlavaTokenprune(Pruned, VideoLLaVA):  # type: ignore[misc]
    """``lmms-eval --model video_llava_tokenprune``."""

    @staticmethod
    def _device_map(device: str) -> str:
        """With "auto", it stays on the CPU; with anything else, it goes to a GPU."""
        return "auto" if device.startswith("cpu") else device
