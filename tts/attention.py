"""Attention of a few query rows over a long context, the shape that speculative decoding lives in.

Stock scaled-dot-product attention repeats every key and value head for the query heads that share
it (or runs one thread per head), and builds a mask of rows x context: at 6,000 keys it reads the
cache at a tenth of the memory bandwidth. Here the query heads that share a key head become rows of
one batched matrix product, so each key and value is read once, where it lies; the causal mask
touches only the last columns. oneDNN compiles a product for every shape that it has not met, which
costs a growing context milliseconds in every pass: up to a multiple of `STEP` positions are read,
and those behind the context masked. Longer blocks (prefill, training) and other devices use
PyTorch's own kernels.

Registered with transformers as the attention implementation ``"tts"``, so that any architecture
that lets its attention be chosen runs on it unchanged.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

MAX_SHORT_ROWS = 32  # beyond this the scores no longer fit the caches and the fused kernel wins
STEP = 64  # positions: products are compiled for multiples of it
SHORT = 3072  # a single row over fewer keys spends its time between operations: one is best


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [batch, heads, rows, head_dim]
    key: torch.Tensor,  # [batch, key_heads, context, head_dim]
    value: torch.Tensor,  # [batch, key_heads, context, head_dim]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    bidirectional: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend ``rows`` queries to the whole context; without a mask, row i sees context-rows+i+1.

    Args:
        bidirectional: without a mask, every row sees everything.

    Returns:
        The output `[batch, rows, heads, head_dim]` and None for the weights, as transformers asks.
    """
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("attention 'tts' has no softcap; load with another attention")
    rows, context = query.shape[2], key.shape[2]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if rows <= MAX_SHORT_ROWS and attention_mask is None and query.device.type == "cpu":
        return _few_rows(query, key, value, scaling, bidirectional).transpose(1, 2), None
    causal = attention_mask is None and rows > 1 and not bidirectional
    if causal and context > rows:
        # is_causal aligns to the top left; a block after a prefix aligns to the bottom right
        attention_mask = torch.ones(rows, context, dtype=torch.bool, device=query.device).tril(
            context - rows
        )
        causal = False
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2), None


def _few_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    bidirectional: bool,
) -> torch.Tensor:
    batch, heads, rows, head_dim = query.shape
    key_heads, context = key.shape[1], key.shape[2]
    shared = heads // key_heads  # query heads that share a key head
    if rows == 1 and context <= SHORT:  # heads are rows that see everything: no mask
        together = query.reshape(batch, key_heads, shared, head_dim)
        output = F.scaled_dot_product_attention(together, key, value, scale=scaling)
        return output.view(batch, heads, rows, head_dim)
    longer = -(-context // STEP) * STEP
    if _has_room(key, longer) and _has_room(value, longer):
        key, value = _lengthened(key, longer), _lengthened(value, longer)
    grouped = (query * scaling).reshape(batch * key_heads, shared * rows, head_dim)
    # keys are the left operand because that is the one oneDNN streams without repacking
    scores = torch.bmm(key.flatten(0, 1), grouped.transpose(1, 2)).transpose(1, 2).contiguous()
    first = context if bidirectional else context - rows + 1  # that some row must not see
    if first < scores.shape[-1]:
        hidden = scores.view(-1, shared, rows, scores.shape[-1])[..., first:]
        hidden.masked_fill_(_hidden(rows, hidden.shape[-1], bidirectional), float("-inf"))
    output = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return output.view(batch, heads, rows, head_dim)


def _has_room(x: torch.Tensor, context: int) -> bool:
    """Whether ``x`` `[batch, heads, shorter, head_dim]` is a view of a buffer that goes on."""
    strides: tuple[int, ...] = x.stride()
    last = sum(
        (n - 1) * s for n, s in zip((*x.shape[:2], context, x.shape[3]), strides, strict=True)
    )
    return x.storage_offset() + last < x.untyped_storage().nbytes() // x.element_size()


def _lengthened(x: torch.Tensor, context: int) -> torch.Tensor:
    return x.as_strided((*x.shape[:2], context, x.shape[3]), x.stride())


@cache
def _hidden(rows: int, width: int, bidirectional: bool) -> torch.Tensor:
    """Which of the last ``width`` columns a row must not see, bool `[rows, width]`."""
    with torch.inference_mode(False):  # learning reads it, too
        every = torch.ones(rows, width, dtype=torch.bool)
        return every if bidirectional else every.triu()


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """None for a causal block at the end of its context, which `attention` masks by itself."""
    padding = kwargs.get("attention_mask")
    plain = (
        kwargs.get("allow_is_causal_skip", True)
        and kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        and kwargs["q_offset"] + kwargs["q_length"] == kwargs["kv_offset"] + kwargs["kv_length"]
    )
    if plain and (padding is None or bool(padding.all())):
        return None
    return sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))


AttentionInterface.register("tts", attention)
AttentionMaskInterface.register("tts", _mask)
