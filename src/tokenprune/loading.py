"""Loading of checkpoints with their processors, for commands, batches and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import MissingExtraError, TokenpruneError
from .prompts import prompter

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


class LoadingError(TokenpruneError, ValueError):
    """A checkpoint, device or dtype by which a model was to be loaded cannot be used."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer, and its processor."""

    model: PreTrainedModel
    processor: ProcessorMixin

    def inputs(self, picture: Image.Image, prompt: str) -> BatchFeature:
        """What the processor makes of one picture and the text `prompt` with its placeholder."""
        made = self.processor(images=picture, text=prompt, return_tensors="pt")
        return made.to(self.model.device, self.model.dtype)

    def text(self, question: str) -> str:
        """`question` in the model's chat template; as it is where it holds a placeholder."""
        return prompter(self.processor)(question)

    def grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        """Patches in height and width of `(..., height, width)` pictures."""
        patch: Any = self.model.config.vision_config.patch_size
        high, wide = (patch, patch) if isinstance(patch, int) else patch
        return pixels.shape[-2] // high, pixels.shape[-1] // wide

    def placeholders(self, ids: torch.Tensor) -> list[int] | None:
        """Placeholders of pictures in each prompt of `(batch, tokens)` ids.

        None where the config of the model does not name a placeholder.
        """
        token = getattr(self.model.config, "image_token_id", None)
        return None if token is None else (ids == token).sum(1).tolist()

    def tiles(self, size: torch.Tensor) -> tuple[int, int]:
        """Tiles in height and width that a picture of `(2,)` height and width is cut into."""
        from transformers.image_processing_utils import select_best_resolution

        config = self.model.config
        best = select_best_resolution(size.tolist(), config.image_grid_pinpoints)
        side: int = config.vision_config.image_size
        return best[0] // side, best[1] // side


def load(path: str, device: str, dtype: str) -> Loaded:
    """Load a checkpoint and its processor; see `load_model` for the arguments."""
    processor = _read("AutoProcessor", path)
    return Loaded(load_model(path, device, dtype), processor)


def load_model(path: str, device: str, dtype: str) -> PreTrainedModel:
    """Load a checkpoint that transformers can read.

    Args:
        path: folder, or name on the hub.
        device: device of the model; "auto" is the GPU where there is one.
        dtype: name of a torch dtype; "auto" is as stored, but float32 for halves on a CPU.
    """
    device = usable_device(device)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LoadingError(f"unknown dtype {dtype!r}; try float32, bfloat16 or float16")
    model: PreTrainedModel = _read("AutoModelForImageTextToText", path, dtype=dtype)
    try:
        model = model.to(device)
    except RuntimeError as error:  # too large for it
        raise _unusable(device, error) from error
    if dtype == "auto" and device == "cpu" and model.dtype == torch.float16:
        model = model.float()  # half precision is emulated, slowly, on most CPUs
    return model.eval()


def usable_device(name: str) -> str:
    """The device that `name` means: for "auto" the GPU where there is one.

    Raises:
        LoadingError: torch cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it has no CUDA
        raise _unusable(name, error) from error
    return name


def _unusable(device: str, error: Exception) -> LoadingError:
    first = str(error).strip().partition("\n")[0]
    return LoadingError(f"cannot use device {device!r}: {first}")


def _read(kind: str, path: str, **options: str) -> Any:
    """What the class `kind` of transformers reads at `path`."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"loading a model needs transformers: pip install 'tokenprune-vlm[hf]' ({error})"
        ) from error
    quiet()
    if path.startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
        raise LoadingError(f"there is no folder {path}; give a checkpoint's folder or a hub name")
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    try:
        return getattr(transformers, kind).from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise LoadingError(f"cannot load a model from {path!r}: {first}") from error


def quiet() -> None:
    """No progress bars and advice of transformers between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
