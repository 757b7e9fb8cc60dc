"""Attention of a few query rows over a long context, the shape that speculative decoding lives in.

Stock scaled-dot-product attention repeats every key and value head for the query heads that share
it (or runs one thread per head), and builds a mask of rows x context: at 6,000 keys it reads the
cache at a tenth of the memory bandwidth. Here the query heads that share a key head become rows of
one fused attention, so each key and value is read once, where it lies. Long contexts are cut in two
halves, as if there were twice as many key heads: three of them keep two cores busy three quarters
of the time, six all of it. What the halves say is put together by their mass.

A row reads up to a multiple of `STEP` positions, and those behind it are masked. That multiple, and
with it every sum, depends on the row's position alone: in bfloat16 a row's result is the same, bit
by bit, whatever block it is part of (asserted by a test). A single float32 row, a draft's, promises
no such thing and takes the shortest way. Longer blocks (prefill, training) and other devices use
PyTorch's own kernels.

Registered with transformers as the attention implementation ``"tts"``, so that any architecture
that lets its attention be chosen runs on it unchanged.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from tts.errors import UserError

MAX_SHORT_ROWS = 32  # beyond this the scores no longer fit the caches and the fused kernel wins
STEP = 64  # positions, see above
SHORT = 1024  # keys up to which halves are not worth their operations
ELSEWHERE = ("softcap", "s_aux", "sinks", "position_bias")  # what this attention cannot do
HALVES = 2  # of the keys; divides `STEP`


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

    Raises:
        UserError: for a cap or sinks, which would be ignored.
    """
    odd = [name for name in ELSEWHERE if kwargs.get(name) is not None]
    if odd:
        raise UserError(
            f"attention: this model's has {', '.join(odd)}, which 'tts' lacks: load it through "
            "load_pair, or with attn_implementation='eager'"
        )
    rows, context = query.shape[2], key.shape[2]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    alike = key.shape[-1] == value.shape[-1]  # not so in latent attention
    here = alike and query.device.type == "cpu"
    if rows <= MAX_SHORT_ROWS and attention_mask is None and here:
        if rows == 1 and query.dtype == torch.float32:
            together = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
            output = F.scaled_dot_product_attention(together, key, value, scale=scaling)
            return output.view_as(query).transpose(1, 2), None
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


def whole_steps(positions: int) -> int:
    """The least multiple of `STEP` that holds so many."""
    return -(-positions // STEP) * STEP


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
    width = whole_steps(context)
    edge = width - STEP  # rows that end before it shall read no further
    before = rows - (context - edge)
    if before > 0 and not bidirectional:
        early = key[:, :, :edge], value[:, :, :edge]
        blocks = ((query[:, :, :before], *early), (query[:, :, before:], key, value))
        return torch.cat([_few_rows(*block, scaling, bidirectional) for block in blocks], 2)
    goes_on = _goes_on(key, width) and _goes_on(value, width)
    if not goes_on:
        width = context
    together = query.reshape(batch, key_heads, shared * rows, head_dim)
    spare = _spare_rows(shared * rows, head_dim)
    if spare:
        zeros = query.new_zeros(batch, key_heads, spare, head_dim)
        together = torch.cat([together, zeros], 2)
    long = goes_on and context > SHORT and batch == 1 and not torch.is_grad_enabled()
    parts = HALVES if long else 1
    mask = _mask_of(rows, shared, spare, context, width, parts, bidirectional, query.dtype)
    if goes_on:
        key, value = _parted(key, width, parts), _parted(value, width, parts)
    if long:
        output = _by_halves(together, key, value, mask, scaling)
    else:
        output = F.scaled_dot_product_attention(together, key, value, mask, scale=scaling)
    if spare:
        output = output[:, :, :-spare]
    return output.reshape(batch, heads, rows, head_dim)


def _by_halves(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`[1, key_heads, rows, head_dim]`, from halves of the keys; a row sees some of either."""
    said, log_mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.expand(HALVES, -1, -1, -1), key, value, attn_mask=mask, scale=scaling
    )
    return _joined(said, log_mass).to(query.dtype)


def _joined(said: torch.Tensor, log_mass: torch.Tensor) -> torch.Tensor:
    """sum_h o_h exp(m_h) / sum_h exp(m_h), with o_h what half h says and m_h its log mass.

    PyTorch's softmax and sigmoid would round a row by its place among the others.
    """
    first, second = said.to(log_mass.dtype)
    share = 1 / (1 + (log_mass[1] - log_mass[0]).exp())[..., None]
    return torch.lerp(second, first, share)[None]


def _spare_rows(rows: int, head_dim: int) -> int:
    """How many to add: kernels take up to 32 at a time, and sum a few in another order."""
    least = 3 if head_dim <= 64 else 6  # the fewest that are summed like many
    return max(0, least - rows % 32) if rows % 32 else 0


def _goes_on(x: torch.Tensor, context: int) -> bool:
    """Whether ``x`` `[batch, heads, shorter, head_dim]` is a view of a buffer that goes on."""
    batch, heads, _, head_dim = x.shape
    over_batch, over_heads, over_positions, step = x.stride()
    last = (batch - 1) * over_batch + (heads - 1) * over_heads + (context - 1) * over_positions
    end = (x.storage_offset() + last + (head_dim - 1) * step + 1) * x.element_size()
    return end <= x.untyped_storage().nbytes()


def _parted(x: torch.Tensor, width: int, parts: int) -> torch.Tensor:
    """The ``width`` positions that begin with those of ``x``, side by side as so many sequences."""
    batch, heads, _, dim = x.shape
    over_batch, *over = x.stride()
    if parts > 1:
        batch, over_batch = parts, width // parts * over[1]
    return x.as_strided((batch, heads, width // parts, dim), (over_batch, *over))


@lru_cache(maxsize=16)
def _mask_of(
    rows: int,
    shared: int,
    spare: int,
    context: int,
    width: int,
    parts: int,
    bidirectional: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Added to the scores of ``shared`` heads, `[parts, 1, shared * rows + spare, each]`."""
    with torch.inference_mode(False):  # learning reads it, too
        seen = torch.full([rows, 1], context)
        if not bidirectional:
            seen -= torch.arange(rows - 1, -1, -1)[:, None]
        hidden = (torch.arange(width) >= seen).repeat(shared, 1)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
        return F.pad(mask, (0, 0, 0, spare)).unflatten(1, (parts, -1)).transpose(0, 1)[:, None]


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
