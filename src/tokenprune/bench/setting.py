"""Setting of a measurement: versions, device, model and data, for every file of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__
from .data import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def setting(
    model: PreTrainedModel, samples: Sequence[Sample], name: str, data: str
) -> dict[str, Any]:
    """The fields `model`, `data`, `device`, `dtype` and `versions` of a result.

    Args:
        model: what was asked.
        samples: what it was asked.
        name: name of the model; empty for its class.
        data: name of the samples.
    """
    import transformers

    return {
        "model": name or type(model).__name__,
        "data": {
            "name": data,
            "questions": len(samples),
            "pictures": len({sample.group for sample in samples}),
        },
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "tokenprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
