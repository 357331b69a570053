"""lmms-eval's `video_llava` (Video-LLaVA of transformers, on videos), compressed."""

from __future__ import annotations

from lmms_eval.models.simple.video_llava import VideoLLaVA

from .pruned import Pruned


class VideoLlavaTokenprune(Pruned, VideoLLaVA):  # type: ignore[misc]
    """``lmms-eval --model video_llava_tokenprune``."""
