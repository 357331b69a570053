"""Door from tokenprune's tools to the adapters that it ships, for what no plugin hook hands over.

Commands and benchmarks import `tokenprune_adapters` here and nowhere else; whatever serves a model
comes through the plugin registry, so that third parties are served alike.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError

if TYPE_CHECKING:
    from tokenprune_adapters.pocket import Question as Question


def pocket_model() -> ModuleType:
    """`tokenprune_adapters.pocket`: the shipped miniature LLaVA and the task it was trained for.

    Raises:
        MissingExtraError: NumPy or Pillow, which draw its pictures, cannot be imported.
    """
    try:
        from tokenprune_adapters import pocket
    except ImportError as error:
        raise MissingExtraError(
            f"the pocket model needs the extra hf: pip install 'tokenprune-vlm[hf]' ({error})"
        ) from error
    return pocket


def feature_layer(config: Any) -> int:
    """Index of the tower block whose output a model of transformers projects, by its config.

    Where a config does not say, it is the last block.
    """
    from tokenprune_adapters.hf.anatomy import configured_layer

    vision = config.vision_config
    blocks: int = getattr(vision, "num_hidden_layers", None) or vision.depth
    return configured_layer(config, -1) % blocks
