"""Key/value cache with O(1) rollback: the only place that knows how a cache is stored.

Keys and values live in preallocated buffers that grow in blocks; appending writes in place and
rolling back moves a length, so a decoding step never copies its context. The layers plug into
transformers' own `Cache`, so every architecture keeps working. Recurrent layers (linear attention,
convolutions) cannot be rolled back by a length: their states are snapshotted and restored.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from tts.errors import UserError

# positions added when a buffer is full
BLOCK = 1024
# a row stride of a large power of two maps all rows to the same few cache sets
STRIDE_PAD = 32


class RollbackLayer(CacheLayerMixin):
    """Attention layer whose newest positions can be dropped by moving a length.

    Args:
        window: if given, a position sees only the newest ``window`` keys, itself included. All keys
            are kept, so a rollback can bring older ones back into the window.
        block: positions added when the buffers are full; a multiple of `tts.attention.STEP`, so
            that there is always room up to the next multiple of it.
    """

    is_croppable = True

    def __init__(self, window: int | None = None, block: int = BLOCK) -> None:
        super().__init__()
        self.window = window
        self._block = block
        self.length = 0
        self._keys: torch.Tensor | None = None  # [batch, key_heads, capacity, head_dim]
        self._values: torch.Tensor | None = None

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[batch, key_heads, rows, head_dim]` and return views of all visible positions."""
        rows = key_states.shape[2]
        end = self.length + rows
        if self._keys is None or end > self._keys.shape[2] - STRIDE_PAD:
            capacity = -(-end // self._block) * self._block + STRIDE_PAD
            self._keys = _grown(self._keys, key_states, self.length, capacity)
            self._values = _grown(self._values, value_states, self.length, capacity)
        assert self._values is not None
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        start = self.get_mask_sizes(rows)[1]
        self.length, self.is_initialized = end, True
        return self._keys[:, :, start:end], self._values[:, :, start:end]

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        self.length = length

    def keys_values(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of positions ``start`` to ``end``."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[:, :, start:end].clone(), self._values[:, :, start:end].clone()

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(visible keys, first visible position) of a block of ``query_length`` rows."""
        start = _first_visible(self.length, self.window)
        return self.length + query_length - start, start

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        self.rollback(self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.rollback(0)


class RollbackCache(Cache):
    """transformers' `Cache` made of `RollbackLayer`s and, in hybrids, of recurrent layers.

    Args:
        config: of the model that will write to this cache.
        window: impose a sliding window on every attention layer (see `RollbackLayer`).
        block: see `RollbackLayer`.

    Raises:
        UserError: if a layer type can be neither rolled back nor snapshotted, or sees less than
            ``window`` by itself.
    """

    def __init__(
        self, config: PreTrainedConfig, window: int | None = None, block: int = BLOCK
    ) -> None:
        # transformers reads the layer types from the config; only the storage is replaced
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[_rollback(layer, window, block) for layer in stock])
        self._recurrent = [x for x in self.layers if isinstance(x, LinearAttentionLayer)]
        self.window = window

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer keeps a state that a length cannot roll back."""
        return bool(self._recurrent)

    def rollback(self, length: int) -> None:
        """Shorten every attention layer to ``length`` positions; recurrent ones need `restore`."""
        for layer in self.layers:
            if isinstance(layer, RollbackLayer):
                layer.rollback(length)

    def keys_values(self, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer, copies of those of the first ``length`` positions in the window."""
        start = _first_visible(length, self.window)
        return [layer.keys_values(start, length) for layer in self.layers]

    def snapshot(self) -> list[dict[str, Any]]:
        """Copies of all recurrent states; a few hundred kilobytes, independent of the context."""
        return [
            {
                "conv": {k: _clone(v) for k, v in layer.conv_states.items()},
                "recurrent": {k: _clone(v) for k, v in layer.recurrent_states.items()},
                "flags": [dict(getattr(layer, name)) for name in _FLAGS],
            }
            for layer in self._recurrent
        ]

    def restore(self, snapshot: list[dict[str, Any]]) -> None:
        """Put all recurrent states back; the snapshot stays valid for another restore."""
        for layer, state in zip(self._recurrent, snapshot, strict=True):
            layer.conv_states = {k: _clone(v) for k, v in state["conv"].items()}
            layer.recurrent_states = {k: _clone(v) for k, v in state["recurrent"].items()}
            for name, flags in zip(_FLAGS, state["flags"], strict=True):
                setattr(layer, name, dict(flags))


_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")


def filled(prefix: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> DynamicCache:
    """A plain cache that holds ``prefix``, the keys and values of each layer; gradients flow."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.to(dtype), values.to(dtype), layer)
    return cache


def window_mask(window: int | None, first: int, rows: int) -> torch.Tensor | None:
    """Which visible keys each row of a block sees, boolean `[1, 1, rows, keys]`.

    None where the plain causal mask says the same: a single row, or a block that no window cuts.

    Args:
        window: positions a row sees, itself included (None: all).
        first: position of the block's first row.
        rows: of the block.
    """
    if window is None or rows == 1 or first + rows <= window:
        return None
    query = torch.arange(first, first + rows)[:, None]
    key = torch.arange(_first_visible(first, window), first + rows)[None]
    return ((key <= query) & (key > query - window))[None, None]


def _first_visible(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position + 1 - window)


def _clone(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state.clone()


def _rollback(layer: Any, window: int | None, block: int) -> Any:
    """The layer that stores what ``layer`` stores, with rollback."""
    if type(layer) is DynamicLayer:
        return RollbackLayer(window, block)
    if type(layer) is DynamicSlidingWindowLayer:
        narrow = layer.sliding_window
        if window is not None and window > narrow:
            raise UserError(
                f"window: {window} is wider than the model's own sliding window of {narrow}: use "
                "at most that, or none"
            )
        return RollbackLayer(window or narrow, block)
    if type(layer) is LinearAttentionLayer:
        return layer
    raise UserError(
        f"cache layer {type(layer).__name__} can be neither rolled back nor snapshotted: "
        "use a model whose layers are full, sliding-window or linear attention"
    )


def _grown(
    buffer: torch.Tensor | None, states: torch.Tensor, length: int, capacity: int
) -> torch.Tensor:
    batch, heads, _, head_dim = states.shape
    grown = states.new_zeros(batch, heads, capacity, head_dim)
    if buffer is not None:
        grown[:, :, :length] = buffer[:, :, :length]
    return grown
