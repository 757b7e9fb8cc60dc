"""A Llama body without the detours: the same numbers in half the operations around the products.

At one to five rows the small operations between the matrix products, and the Python that calls
them, take as long as the products. Here queries, keys and values come from one product where the
weights never change, gate and up from another; queries and keys are rotated together, nothing is
looked up by name, and no mask is built. Every value is bit-identical to transformers' own (asserted
by a test), so it changes no token; whatever is not plain decoding with our cache goes to
transformers.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from tts.attention import attention
from tts.cache import RollbackCache
from tts.packing import PackedLinear, pack


def straighten(model: PreTrainedModel, frozen: bool = False) -> None:
    """Give every plain `LlamaModel` with our attention inside ``model`` the shorter way.

    Args:
        model: packed already, if it shall be.
        frozen: nobody writes to its weights; those of the attention are laid side by side.
    """
    for module in model.modules():
        if type(module) is LlamaModel:
            config = module.config
            if config._attn_implementation == "tts" and config.hidden_act == "silu":
                module.forward = MethodType(_forward, module)
                for layer in module.layers if frozen else ():
                    _join(layer.self_attn, "q_proj", "k_proj", "v_proj")
                    _join(layer.mlp, "gate_proj", "up_proj")


def _join(module: Any, *names: str) -> None:
    """Let the weights of linear layers be parts of one, which is packed as a whole."""
    parts = [module.get_submodule(name) for name in names]
    if any(type(x) not in (nn.Linear, PackedLinear) or x.bias is not None for x in parts):
        return  # compressed, or of another family
    widths = [x.out_features for x in parts]
    whole = nn.Linear(parts[0].in_features, sum(widths), bias=False, device="meta")
    weight = torch.cat([x.weight for x in parts]).detach()
    whole.weight = nn.Parameter(weight, requires_grad=False)
    pack(whole)
    for part, rows in zip(parts, weight.split(widths), strict=True):
        part.weight = nn.Parameter(rows, requires_grad=False)
    module.__dict__["joint"] = whole  # no module of the tree: it holds nothing of its own


def _joint(module: Any, x: torch.Tensor, *names: str) -> torch.Tensor:
    """The products of ``x`` with linear layers of ``module``, side by side."""
    if (whole := module.__dict__.get("joint")) is not None:
        return whole(x)
    return torch.cat([getattr(module, name)(x) for name in names], -1)


def _forward(
    self: LlamaModel,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """`LlamaModel.forward`, shorter for a pass that appends tokens to a `RollbackCache`."""
    asked = {name for name, value in kwargs.items() if value}
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
    batch, rows = hidden.shape[:2]
    first = past_key_values.get_seq_length()
    positions = torch.arange(first, first + rows, device=hidden.device)[None]
    cos, sin = self.rotary_emb(hidden, positions)  # [1, rows, head_dim]
    half = sin.shape[-1] // 2
    turn = torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, None]
    cos = cos[:, None]
    states = [hidden]
    for layer, stored in zip(self.layers, past_key_values.layers, strict=False):
        module = layer.self_attn
        dim = module.head_dim
        x = _norm(hidden, layer.input_layernorm)
        every = _joint(module, x, "q_proj", "k_proj", "v_proj")
        every = every.view(batch, rows, -1, dim).transpose(1, 2)
        shared = every.shape[1] // (module.num_key_value_groups + 2)  # key heads
        turned, value = every[:, :-shared], every[:, -shared:]
        turned = turned * cos + turned.roll(half, -1) * turn
        keys, values = stored.update(turned[:, -shared:], value)
        mixed, _ = attention(
            module, turned[:, :-shared], keys, values, attention_mask, scaling=module.scaling
        )
        hidden = hidden + module.o_proj(mixed.reshape(batch, rows, -1))
        x = _norm(hidden, layer.post_attention_layernorm)
        mlp = layer.mlp
        gate, up = _joint(mlp, x, "gate_proj", "up_proj").chunk(2, -1)
        hidden = hidden + mlp.down_proj(F.silu(gate) * up)
        states.append(hidden)
    states[-1] = _norm(hidden, self.norm)
    wanted = tuple(states) if kwargs.get("output_hidden_states") else None
    return BaseModelOutputWithPast(states[-1], past_key_values, wanted)


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    return module.weight * F.rms_norm(x, x.shape[-1:], None, module.variance_epsilon)
