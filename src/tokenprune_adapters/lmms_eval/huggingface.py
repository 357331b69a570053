"""lmms-eval's `huggingface` (whatever transformers loads as image-text-to-text), compressed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from lmms_eval.models.chat import huggingface

from .mixin import Pruned


class HuggingfaceTokenprune(Pruned, huggingface.Huggingface):  # type: ignore[misc]
    """``lmms-eval --model huggingface_tokenprune``: any class that has an adapter."""

    processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Pruned`.

        lmms-eval 0.7.3 looks for the name of a model's type among classes of configs, finds none,
        and loads every model without the head that it needs to answer. Here it gets one.
        """
        with patch.object(huggingface, "AutoModel", huggingface.AutoModelForImageTextToText):
            super().__init__(*args, **kwargs)
        self.processor = _Processor(self.processor)

    @property
    def _image_processor(self) -> Any:
        return self.processor

    @staticmethod
    def _device_map(device: str) -> str:
        """With "auto", its own default, inputs go to a GPU whatever the device is."""
        return device


class _Processor:
    """A processor that is not asked about media that a prompt does not have.

    lmms-eval 0.7.3 hands empty lists of videos to processors, and of sounds under a name that
    transformers refuses.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, *args: Any, audios: Any = None, **kwargs: Any) -> Any:
        given = kwargs | {"audio": audios}
        return self._processor(
            *args, **{k: v for k, v in given.items() if v is not None and v != []}
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)
