"""The DFlash drafter: a block of drafts in one pass, conditioned on the target's features.

With t = norm_h(fc [f_1 ; ... ; f_n]) of every committed position before the anchor x_s, each layer
computes for the block x_s, MASK, ..., MASK (rows s to s + B - 1)

    Q = W_q n      K = [W_k t ; W_k n]      V = [W_v t ; W_v n]      n = input_norm(x)

The block sees all of the context and all of itself; row k predicts x_{s+k}, row 0 nothing. Context
rows have no query and no MLP: t is the same at every layer (arXiv 2602.06036).
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from tts.attention import attention
from tts.lean import Rotation, join, joint, norm, rotation, swiglu, turned

Keys = tuple[torch.Tensor, torch.Tensor]  # [batch, key_heads, rows, head_dim]


class DFlashConfig(Qwen3Config):
    """`Qwen3Config` of the layers, and what makes them a drafter.

    Args:
        target_hidden_size: width of one feature.
        target_layers: the layers read, as indices into transformers' ``hidden_states``.
        block_size: rows of a block; one less is drafted.
        mask_token_id: whose embedding stands for a token that is not known.
        draft_vocab_size: ids predicted.
        tokenizer_fingerprint: of the target's tokenizer ("": unknown).
    """

    model_type = "dflash"

    target_hidden_size: int = 0
    target_layers: tuple[int, ...] = ()
    block_size: int = 16
    mask_token_id: int = 0
    draft_vocab_size: int = 0
    tokenizer_fingerprint: str = ""


class Attention(nn.Module):
    """Attention of a block to the context and to itself."""

    def __init__(self, config: DFlashConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.scaling = config.head_dim**-0.5
        width, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, width, bias=bias)
        self.q_norm = Qwen3RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(dim, config.rms_norm_eps)

    def keys(self, x: torch.Tensor, by: Rotation) -> Keys:
        """Keys and values of context rows t or of block rows n."""
        both = self._heads(joint(self, x, "k_proj", "v_proj"))
        key, value = both.chunk(2, 1)
        return turned(norm(key, self.k_norm), by), value

    def forward(
        self,
        x: torch.Tensor,
        by: Rotation,
        cache: Any,
        mask: torch.Tensor | None,
        context: Keys | None,
    ) -> torch.Tensor:
        query = turned(norm(self._heads(self.q_proj(x)), self.q_norm), by)
        own = self.keys(x, by)
        if context is not None:
            own = torch.cat([context[0], own[0]], 2), torch.cat([context[1], own[1]], 2)
        key, value = cache.update(*own, self.index)
        mixed, _ = attention(
            self, query, key, value, mask, scaling=self.scaling, bidirectional=mask is None
        )
        return cast(torch.Tensor, self.o_proj(mixed.reshape(*x.shape[:2], -1)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class Layer(nn.Module):
    """A Qwen3 layer over block rows."""

    def __init__(self, config: DFlashConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def join(self) -> None:
        """See `tts.llama.straighten`."""
        join(self.self_attn, "k_proj", "v_proj")
        join(self.mlp, "gate_proj", "up_proj")

    def forward(self, x: torch.Tensor, *seen: Any) -> torch.Tensor:
        x = x + cast(torch.Tensor, self.self_attn(norm(x, self.input_layernorm), *seen))
        return x + swiglu(self.mlp, norm(x, self.post_attention_layernorm))


class DFlash(PreTrainedModel):
    """The drafter, with embedding and head of the target lent to it."""

    config_class = DFlashConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    draft_ids: torch.Tensor
    stream: torch.dtype | None = None  # see `tts.llama.straighten`

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        wide = len(config.target_layers) * config.target_hidden_size
        self.fc = nn.Linear(wide, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.register_buffer("draft_ids", torch.arange(config.draft_vocab_size))
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def read(self, features: torch.Tensor, cache: Any, first: int) -> None:
        """Append the context rows of ``features`` `[batch, rows, layers x target_hidden_size]`.

        Args:
            features: of consecutive positions.
            cache: that `forward` will see.
            first: position of the first.
        """
        for index, keys in enumerate(self._context(features, first)):
            cache.update(*keys, index)

    def _context(self, features: torch.Tensor, first: int) -> Iterator[Keys]:
        """Of every layer, keys and values of the context rows."""
        context = norm(self.fc(features), self.hidden_norm)
        by = rotation(self.rotary_emb, context, range(first, first + features.shape[1]))
        for layer in self.layers:
            yield cast(Attention, layer.self_attn).keys(context, by)

    def forward(
        self,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        mask: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        features: torch.Tensor | None = None,
        first: int = 0,
    ) -> torch.Tensor:
        """Hidden states after the final norm, `[batch, blocks x block_size, hidden]`.

        Args:
            anchors: the blocks' first tokens `[batch, blocks]`.
            positions: of the anchors `[batch, blocks]`.
            cache: holds the context; the block rows are appended, to be dropped by the caller.
            mask: which keys a row sees, see `block_mask` (None: all, for a single block).
            dtype: that of the keys in the cache (None: that of the weights).
            features: further context, appended before the block rows, as in `read`.
            first: position of the first of ``features``.
        """
        config: DFlashConfig = self.config
        size = config.block_size
        ids = anchors.new_full((*anchors.shape, size), config.mask_token_id)
        ids[..., 0] = anchors
        x = self.embed_tokens(ids.flatten(1)).to(dtype or self.fc.weight.dtype)
        rows = positions[..., None] + torch.arange(size, device=positions.device)
        by = rotation(self.rotary_emb, x, rows.flatten(1))
        context = repeat(None) if features is None else self._context(features, first)
        for layer, keys in zip(self.layers, context, strict=False):
            x = layer(x, by, cache, mask, keys)
        return norm(x, self.norm)

    def unroll(
        self,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        cache: Any,
        first: int = 0,
        window: int | None = None,
    ) -> torch.Tensor:
        """Draft a block from many anchors at once, each from the context before it.

        Args:
            anchors: tokens `[batch, blocks]`.
            positions: of the anchors `[batch, blocks]`.
            features: of positions ``first`` on, `[batch, rows, layers x target_hidden_size]`.
            cache: a `DynamicCache` with the context before ``first``; everything is appended.
            first: see above.
            window: positions that an anchor sees, itself included (None: all).

        Returns:
            `[batch, blocks, block_size, hidden]`.
        """
        keys = range(first - cache.get_seq_length(), first + features.shape[1])
        mask = block_mask(positions, keys, self.config.block_size, window)
        hidden = self(anchors, positions, cache, mask, features=features, first=first)
        return hidden.view(*anchors.shape, self.config.block_size, -1)


def block_mask(positions: torch.Tensor, keys: range, size: int, window: int | None) -> torch.Tensor:
    """What the rows of several blocks see: the context before their anchor, and their own block.

    Args:
        positions: of the anchors `[batch, blocks]`.
        keys: positions of the context.
        size: rows of a block.
        window: positions that an anchor sees, itself included (None: all).

    Returns:
        bool `[batch, 1, blocks x size, keys + blocks x size]`.
    """
    device = positions.device
    key = torch.arange(keys.start, keys.stop, device=device)
    seen = key < positions[..., None]
    if window is not None:
        seen &= key > positions[..., None] - window
    blocks = torch.eye(positions.shape[1], dtype=torch.bool, device=device)
    own = blocks.repeat_interleave(size, 1).expand(len(positions), -1, -1)
    return torch.cat([seen, own], -1).repeat_interleave(size, 1)[:, None]
