"""A Llama body without the detours, made of the pieces in `tts.lean`.

Nothing is looked up by name and no mask is built. Every value is bit-identical to transformers' own
(asserted by a test), so it changes no token; whatever is not plain decoding with our cache goes to
transformers.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from tts.attention import attention
from tts.cache import RollbackCache
from tts.lean import join, joint, norm, rotation, swiglu, turned


def straighten(model: nn.Module, stream: torch.dtype | None = None) -> None:
    """Give every plain `LlamaModel` with our attention inside ``model`` the shorter way.

    Layers that are written in those pieces have their products joined. A model that shall be packed
    is packed already.

    Args:
        model: see above.
        stream: dtype between its products, and of its keys, where no gradient is asked for (None:
            that of the weights).
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "join"):
            module.join()
        if hasattr(module, "embed_tokens"):
            module.stream = stream
        if type(module) is LlamaModel:
            config = module.config
            if config._attn_implementation == "tts" and config.hidden_act == "silu":
                module.forward = MethodType(_forward, module)
                for layer in module.layers:
                    join(layer.self_attn, "q_proj", "k_proj", "v_proj")
                    join(layer.mlp, "gate_proj", "up_proj")


def _forward(
    self: LlamaModel,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """`LlamaModel.forward`, shorter for a pass that appends tokens to a `RollbackCache`."""
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    asked -= {"use_cache", "output_hidden_states"}
    plain = (
        isinstance(past_key_values, RollbackCache)
        and position_ids is None
        and (attention_mask is None or attention_mask.dim() == 4)
        and not asked
        and not torch.is_grad_enabled()
    )
    if not plain:
        return LlamaModel.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
    hidden = self.embed_tokens(input_ids)
    hidden = hidden.to(self.stream or hidden.dtype)
    batch, rows = hidden.shape[:2]
    first = past_key_values.get_seq_length()
    by = rotation(self.rotary_emb, hidden, range(first, first + rows))
    states = [hidden]
    for layer, stored in zip(self.layers, past_key_values.layers, strict=False):
        module = layer.self_attn
        dim = module.head_dim
        x = norm(hidden, layer.input_layernorm)
        every = joint(module, x, "q_proj", "k_proj", "v_proj")
        every = every.view(batch, rows, -1, dim).transpose(1, 2)
        shared = every.shape[1] // (module.num_key_value_groups + 2)  # key heads
        both = turned(every[:, :-shared], by)
        keys, values = stored.update(both[:, -shared:], every[:, -shared:])
        mixed, _ = attention(
            module, both[:, :-shared], keys, values, attention_mask, scaling=module.scaling
        )
        hidden = hidden + module.o_proj(mixed.reshape(batch, rows, -1))
        x = norm(hidden, layer.post_attention_layernorm)
        hidden = hidden + swiglu(layer.mlp, x)
        states.append(hidden)
    states[-1] = norm(hidden, self.norm)
    wanted = tuple(states) if kwargs.get("output_hidden_states") else None
    return BaseModelOutputWithPast(states[-1], past_key_values, wanted)
