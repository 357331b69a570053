"""Queries and keys of an attention, as its kernel gets them: after norms, rotation and caching.

Modules of transformers look the kernel up by a name in their config. An attention that is read
gets, for itself alone, a view of its config that names our function instead. It hands queries and
keys to whoever asked in that very call, and then calls the kernel that the config really names. So
what is read is the truth for every architecture, and what the module computes stays the same to the
bit.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable

from ..kit.attention_rows import dot
from .names import Call, Signature
from .split_heads import refuse_split

_OURS = "tokenprune"
"""Name of our function among those of transformers."""

_KERNEL = Signature.of_names("attention function", "query", "key", "value", *Call.mask.names)

_REGISTRY, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


@dataclass(frozen=True, eq=False)
class Asked:
    """Queries and keys of one call of an attention.

    Attributes:
        query: `(batch, heads, slots, channels)`.
        key: `(batch, heads or fewer, keys, channels)`, cached ones first.
        scale: factor of the products.
        cap: bound of a tanh around the scaled products, or None.
        sinks: `(heads,)` logits of a slot that takes attention and gives nothing, or None.
        mask: `(batch, 1 or heads, slots, keys)` bool, or added to the products; None where the
            kernel got none of that kind.
    """

    query: Tensor
    key: Tensor
    scale: float
    cap: float | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None

    def rows(self, queries: Tensor, visible: Tensor) -> Tensor:
        """Attention of some queries to all keys, softmax in float32.

        Args:
            queries: `(batch, queries)` int64, the slots that ask.
            visible: `(batch, queries, keys)` bool, what each of them may attend to.

        Returns:
            `(batch, heads, queries, keys)` float32.
        """
        batch, heads, _, channels = self.query.shape
        asked, groups = queries.shape[1], self.key.shape[1]
        index = queries[:, None, :, None].expand(-1, heads, -1, channels)
        asking = self.query.gather(2, index).float()
        # Heads that share keys stand side by side: (group, its heads and queries).
        grouped = asking.reshape(batch, groups, -1, channels)
        logits = dot(grouped, self.key) * self.scale
        logits = logits.reshape(batch, heads, asked, -1)
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        if self.mask is not None:
            rows = queries[:, None, :, None].expand(-1, self.mask.shape[1], -1, self.mask.shape[3])
            mask = self.mask.expand(batch, -1, -1, -1).gather(2, rows)[..., : self.key.shape[2]]
            if mask.dtype == torch.bool:
                visible = visible[:, None] & mask
            else:
                logits, visible = logits + mask.float(), visible[:, None]
        else:
            visible = visible[:, None]
        logits = logits.masked_fill(~visible, -torch.inf)
        if self.sinks is None:
            return torch.softmax(logits, dim=-1)
        sinks = self.sinks.float().reshape(1, -1, 1, 1).expand(batch, -1, asked, 1)
        return torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1)[..., :-1]


Reader = Callable[[Asked], None]
"""Takes the queries and keys of a call of an attention."""


def attention_in(layer: nn.Module) -> nn.Module:
    """The module in a decoder layer that calls a kernel.

    Raises:
        UnsupportedError: there is none whose queries and keys can be read, or more than one.
    """
    found = [each for each in layer.modules() if _REGISTRY in _names(each)]
    if len(found) != 1:
        raise UnsupportedError(
            f"attention rows of {type(layer).__name__} cannot be read: {len(found)} of its modules "
            "call one of transformers' attention functions, where exactly one must"
        )
    if not hasattr(found[0], "config"):
        raise UnsupportedError(
            f"attention rows of {type(layer).__name__} cannot be read: "
            f"{type(found[0]).__name__} has no config that names its kernel"
        )
    # Kernels take whatever they do not know, but the one beside the module spells all names.
    eager = _globals(found[0]).get(_EAGER)
    missing = [] if eager is None else Signature.of(eager).missing(Call.mask, Call.scale)
    if missing:
        raise UnsupportedError(
            f"attention rows of {type(layer).__name__} cannot be read: its attention functions do "
            f"not take {', '.join(missing)}; rank by cls-attention, or before the LLM"
        )
    return found[0]


class ReadAttention(NotCopyable):
    """Reader of the attention of one decoder layer, whose config is viewed while it is installed.

    Args:
        layer: a decoder layer.

    Raises:
        UnsupportedError: its queries and keys cannot be read.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.attention = attention_in(layer)
        self._local = threading.local()

    def install(self) -> Iterator[Removable]:
        """Yield the handle, which gives the attention its own config back."""
        AttentionInterface.register(_OURS, _attend)
        config = vars(self.attention)["config"]
        if not isinstance(config, ConfigView):
            config = ConfigView(config, _globals(self.attention))
            vars(self.attention)["config"] = config
        config.readers.append(self)
        yield _View(self, config)

    def ask(self, reader: Reader | None) -> None:
        """Let `reader` have queries and keys of this thread's next call; None for nobody.

        Some layers keep the arguments that they don't know to themselves, so none can tell the
        attention. What an exception left behind is forgotten here.
        """
        self._local.reader = reader

    @property
    def asks(self) -> Reader | None:
        """Who wants queries and keys of the call of this thread, once."""
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is not None:
            self._local.reader = None
        return reader


class ConfigView(NotCopyable):
    """View of a config, live, in which the kernel has our name.

    Args:
        config: the config of the model.
        names: the names that the attention's own code sees.
    """

    _attn_implementation = _OURS

    def __init__(self, config: Any, names: Mapping[str, Any]) -> None:
        self.config = config
        self.names = names
        self.readers: list[ReadAttention] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    @property
    def kernel(self) -> Callable[..., Any]:
        """The function that the config names."""
        name = self.config._attn_implementation
        kernel: Callable[..., Any] = self.names[_REGISTRY].get_interface(
            name, self.names.get(_EAGER)
        )
        if kernel is None:
            raise UnsupportedError(
                f"attention implementation {name!r} has no function that can be read around; use "
                "model.set_attn_implementation('sdpa')"
            )
        return kernel


@dataclass(frozen=True, eq=False)
class _View:
    """View on one attention; the last that is removed shows the config itself again."""

    reading: ReadAttention
    config: ConfigView

    def remove(self) -> None:
        """Take it away again."""
        held = vars(self.reading.attention)
        if self.reading in self.config.readers:
            self.config.readers.remove(self.reading)
        if not self.config.readers and held["config"] is self.config:
            held["config"] = self.config.config


class _Plain:
    """An attention as it is without our view, for kernels that look the config up once more."""

    def __init__(self, attention: nn.Module, config: Any) -> None:
        self._attention = attention
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Attention function of transformers that hands queries and keys on to who asked for them."""
    view = module.config
    if not isinstance(view, ConfigView):
        raise AttachError(f"attention function {_OURS!r} is for attached models only")
    # Not in one line: torch.compile cannot trace a name that is bound inside of a comprehension.
    asking = [each.asks for each in view.readers]
    readers = [each for each in asking if each is not None]
    if readers:
        call = Call(_KERNEL, (query, key, value, *args), kwargs)
        if call.bias is not None:
            raise UnsupportedError(
                f"{type(module).__name__} adds a bias to its logits, which is not read; rank by "
                "cls-attention, or before the LLM"
            )
        heads = getattr(view.config, "num_attention_heads", query.shape[1])
        if query.shape[1] < heads:
            refuse_split(type(module).__name__, query.shape[1], heads)
        scale = 1 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale
        mask = _full(call.mask)
        asked = Asked(query.detach(), key.detach(), scale, call.cap, call.sinks, mask)
        with torch.no_grad():
            for read in readers:
                read(asked)
    return view.kernel(_Plain(module, view.config), query, key, value, *args, **kwargs)


def _full(mask: Any) -> Tensor | None:
    """A mask with an axis of queries; others (of FlashAttention, of blocks) are known without."""
    return mask.detach() if isinstance(mask, Tensor) and mask.ndim == 4 else None


def _globals(module: nn.Module) -> Mapping[str, Any]:
    """What a module's forward finds by name."""
    found: Mapping[str, Any] = inspect.unwrap(type(module).forward).__globals__
    return found


def _names(module: nn.Module) -> tuple[str, ...]:
    """Global names in the code of a module's forward."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names
