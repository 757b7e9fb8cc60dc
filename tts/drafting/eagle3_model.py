"""The EAGLE-3 head: one decoder layer that reads the target's own features (arXiv 2503.01840).

Pair i is (g_i, embedding of x_{i+1}), g_i the fused features of position i, and predicts x_{i+2}:

    g = fc [f_low ; f_middle ; f_high]
    c = [norm_e(embedding) ; norm_h(g)]                        in R^2D
    y = r + Attention(c)          r = g, or norm_h(g) where ``norm_before_residual``
    h = y + SwiGLU(norm_p(y))     logits = lm_head(norm(h)) over the draft's ids

To draft further than the target has read, h stands in for the next g.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from tts.attention import attention
from tts.cache import window_mask
from tts.lean import Rotation, join, joint, norm, rotation, swiglu, turned


class Eagle3Config(LlamaConfig):
    """`LlamaConfig` of the layer, and what makes it a head.

    Args:
        target_hidden_size: width of one feature.
        target_layers: the layers read, as indices into transformers' ``hidden_states``.
        draft_vocab_size: ids predicted.
        norm_before_residual: the residual starts from the normed g.
        norm_output: the recurrence takes h after the final norm.
        fc_norm: every feature is normed before ``fc``.
        norm_before_fc: the concatenated features are normed before ``fc``.
        qk_norm: queries and keys are normed by head.
        tokenizer_fingerprint: of the target's tokenizer ("": unknown).
    """

    model_type = "eagle3"

    target_hidden_size: int = 0
    target_layers: tuple[int, ...] = ()
    draft_vocab_size: int = 0
    norm_before_residual: bool = False
    norm_output: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    qk_norm: bool = False
    tokenizer_fingerprint: str = ""


Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values [batch, key_heads, rows, head_dim]


class Attention(nn.Module):
    """Grouped-query attention whose input is ``width`` wide."""

    def __init__(self, config: Eagle3Config, index: int, width: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.scaling = config.head_dim**-0.5
        self.key_heads = config.num_key_value_heads
        out, kv = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = nn.Linear(width, out * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(out * self.head_dim, config.hidden_size, bias=bias)
        eps = config.rms_norm_eps
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps)

    def forward(
        self,
        x: torch.Tensor,
        by: Rotation,
        cache: Any,
        mask: torch.Tensor | None,
        own: list[Keys] | None,
    ) -> torch.Tensor:
        """Attend to the cached keys and to the rows' own.

        Args:
            x: `[batch, rows, width]`.
            by: rotation of the rows' positions.
            cache: appended to, unless ``own`` is given.
            mask: which cached keys a row sees (None: the causal ones).
            own: of a recurrent step over many roots at once: keys that only the row with the same
                index sees, of all recurrent steps so far; this step's are appended.
        """
        batch, rows = x.shape[:2]
        every = joint(self, x, "q_proj", "k_proj", "v_proj")
        every = every.view(batch, rows, -1, self.head_dim).transpose(1, 2)
        both, value = every[:, : -self.key_heads], every[:, -self.key_heads :]
        if self.qk_norm:
            query, key = both[:, : -self.key_heads], both[:, -self.key_heads :]
            both = torch.cat([norm(query, self.q_norm), norm(key, self.k_norm)], 1)
        both = turned(both, by)
        query, key = both[:, : -self.key_heads], both[:, -self.key_heads :]
        if own is None:
            if cache is not None:
                key, value = cache.update(key, value, self.index)
            mixed, _ = attention(self, query, key, value, mask, scaling=self.scaling)
        else:
            own.append((key, value))
            assert mask is not None
            mixed = self._roots(query, cache.layers[self.index], mask, own)
        return cast(torch.Tensor, self.o_proj(mixed.reshape(batch, rows, -1)))

    def _roots(
        self, query: torch.Tensor, stored: Any, mask: torch.Tensor, own: list[Keys]
    ) -> torch.Tensor:
        """One softmax over the cached keys that a root sees and its own of the recurrent steps."""
        batch, heads, rows, dim = query.shape
        key, value = stored.keys, stored.values
        grouped = query.view(batch, key.shape[1], -1, rows, dim) * self.scaling
        shared = grouped @ key[:, :, None].transpose(-1, -2)
        scores = [shared.masked_fill(~mask, float("-inf"))]
        scores += [(grouped * k[:, :, None, :rows]).sum(-1, keepdim=True) for k, _ in own]
        weights = torch.cat(scores, -1).float().softmax(-1).to(query.dtype)
        mixed = weights[..., : key.shape[2]] @ value[:, :, None]
        for j, (_, v) in enumerate(own):
            at = key.shape[2] + j
            mixed = mixed + weights[..., at : at + 1] * v[:, :, None, :rows]
        return mixed.reshape(batch, heads, rows, dim).transpose(1, 2)


class Layer(nn.Module):
    """The first layer reads embedding and features side by side, any further one is ordinary."""

    def __init__(self, config: Eagle3Config, index: int) -> None:
        super().__init__()
        self.first, self.norm_before_residual = index == 0, config.norm_before_residual
        width, eps = config.hidden_size, config.rms_norm_eps
        if self.first:
            self.hidden_norm = LlamaRMSNorm(width, eps)
        self.input_layernorm = LlamaRMSNorm(width, eps)
        self.self_attn = Attention(config, index, width * (2 if self.first else 1))
        self.post_attention_layernorm = LlamaRMSNorm(width, eps)
        self.mlp = LlamaMLP(config)

    def join(self) -> None:
        """See `tts.llama.straighten`."""
        join(self.self_attn, "q_proj", "k_proj", "v_proj")
        join(self.mlp, "gate_proj", "up_proj")

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, *seen: Any) -> torch.Tensor:
        if self.first:
            normed = norm(hidden, self.hidden_norm)
            x = torch.cat([norm(embedding, self.input_layernorm), normed], -1)
            hidden = normed if self.norm_before_residual else hidden
        else:
            x = norm(hidden, self.input_layernorm)
        hidden = hidden + self.self_attn(x, *seen)
        return hidden + swiglu(self.mlp, norm(hidden, self.post_attention_layernorm))


class Eagle3(PreTrainedModel):
    """The head, with the target's embedding lent to it."""

    config_class = Eagle3Config
    _supports_sdpa = True
    _supports_attention_backend = True

    draft_ids: torch.Tensor
    stream: torch.dtype | None = None  # see `tts.llama.straighten`

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        width, features = config.hidden_size, len(config.target_layers)
        wide = features * config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.fc = nn.Linear(wide, width, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                LlamaRMSNorm(config.target_hidden_size, config.rms_norm_eps)
                for _ in range(features)
            )
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(wide, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_buffer("draft_ids", torch.arange(config.draft_vocab_size))
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """g `[..., hidden]` of the target's ``features`` `[..., layers x target_hidden_size]`."""
        config: Eagle3Config = self.config
        if config.fc_norm:
            parts = features.split(config.target_hidden_size, -1)
            normed = [norm(part, own) for own, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, -1)
        if config.norm_before_fc:
            features = norm(features, self.input_norm)
        return cast(torch.Tensor, self.fc(features))

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        positions: range | torch.Tensor | None = None,
        own: list[list[Keys]] | None = None,
    ) -> torch.Tensor:
        """h before the final norm, `[batch, rows, hidden]`.

        Args:
            input_ids: the pairs' tokens `[batch, rows]`.
            hidden: the pairs' g, or the h that stands in for it.
            past_key_values: holds the pairs before these.
            attention_mask: as in `Attention`.
            positions: of the pairs, consecutive or `[rows]` (None: those after the cached ones).
            own: as in `Attention`, layer by layer.
        """
        embedding = self.embed_tokens(input_ids).to(hidden.dtype)
        if positions is None:
            held = past_key_values.get_seq_length()
            positions = range(held, held + input_ids.shape[1])
        elif isinstance(positions, torch.Tensor):
            positions = positions[None]
        by = rotation(self.rotary_emb, hidden, positions)
        for index, layer in enumerate(self.layers):
            mine = None if own is None else own[index]
            hidden = layer(hidden, embedding, by, past_key_values, attention_mask, mine)
        return hidden

    def recur(self, hidden: torch.Tensor) -> torch.Tensor:
        """What stands in for the next g."""
        return norm(hidden, self.norm) if self.config.norm_output else hidden

    def unroll(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        depth: int,
        cache: Any,
        roots: torch.Tensor | None = None,
        first: int = 0,
        window: int | None = None,
    ) -> list[torch.Tensor]:
        """Draft ``depth`` tokens from many pairs at once, along the given text.

        Step 0 is the plain pass over all rows. In step i the row of root t has its own h of step
        i - 1 and the token of pair t + i; it sees the true pairs up to t and its own earlier steps,
        exactly as when a chain is drafted from there (training-time test).

        Args:
            input_ids: the pairs' tokens `[batch, rows]`.
            features: `[batch, rows, layers x target_hidden_size]`.
            depth: steps.
            cache: a `DynamicCache` with the pairs before; the rows' are appended.
            roots: rows from which chains are drafted, ascending (None: all).
            first: position of the first pair.
            window: positions that a row sees (None: all).

        Returns:
            h of each step: `[batch, rows, hidden]`, then `[batch, r, hidden]` for the r first roots
            whose pair t + i is given; their row predicts what that pair predicts.
        """
        rows, device = input_ids.shape[1], input_ids.device
        mask = window_mask(window, first, rows)
        mask = None if mask is None else mask.to(device)
        steps = [self(input_ids, self.fuse(features), cache, mask, range(first, first + rows))]
        if roots is None:
            roots = torch.arange(rows)
        last = cache.get_seq_length()
        key = torch.arange(first + rows - last, first + rows, device=device)[None]
        own: list[list[Keys]] = [[] for _ in self.layers]
        hidden = steps[0][:, roots]
        for i in range(1, depth):
            roots = roots[roots + i < rows]
            positions = first + roots + i
            root = (first + roots).to(device)[:, None]
            seen = key <= root
            if window is not None:
                seen &= key > root + i - window
            hidden = self.recur(hidden[:, : len(roots)])
            hidden = self(input_ids[:, roots + i], hidden, cache, seen, positions, own)
            steps.append(hidden)
        return steps
