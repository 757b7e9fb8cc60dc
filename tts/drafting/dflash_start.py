"""What a DFlash drafter begins as before it is trained.

Its layers are the target's, but what they read is not: a block holds a single token, and the
context is made of the target's features. So the first layer begins as a look-up of that token, and
the features are whitened for the optimizer. Both are weights of the published layout.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from tts.drafting import checkpoint
from tts.drafting.dflash_model import Attention, DFlash, DFlashConfig

SAMPLE = 16, 256  # sequences and ids of the text that a new drafter's features are measured on
SHARP = 1.5  # an anchor's score in a look-up is 8 SHARP^2 at 64 numbers a head
LOUD = 0.3  # size of an embedding's numbers after it: larger than it was, for steps to matter less
FLOOR = 1e-4  # of the mean variance: what varies less is not made larger


def from_target(
    target: PreTrainedModel,
    ids: torch.Tensor,
    features: tuple[int, ...],
    layers: tuple[int, ...],
    block_size: int,
    mask_token_id: int,
    fingerprint: str,
    neurons: int = 0,
) -> DFlash:
    """A new drafter, in float32, that reads ``features``.

    Args:
        target: whose embedding and head it borrows.
        ids: that it predicts.
        features: see `DFlashConfig.target_layers`.
        layers: of the target that its own begin as copies of.
        block_size: see `DFlashConfig`.
        mask_token_id: see `DFlashConfig`.
        fingerprint: of the target's tokenizer.
        neurons: of each copied MLP (0: all).
    """
    fields = checkpoint.new_config(target, ids, features, layers, fingerprint)
    fields["intermediate_size"] = neurons or fields["intermediate_size"]
    config = DFlashConfig(**fields, block_size=block_size, mask_token_id=mask_token_id)
    model = DFlash(config)
    model.draft_ids = ids
    states = sample(target)
    new: Any
    for new, old in zip(model.layers, layers, strict=True):
        source = target.model.layers[old]
        _copy_mlp(source.mlp, new.mlp, source.post_attention_layernorm(states[old]))
        new.post_attention_layernorm.load_state_dict(source.post_attention_layernorm.state_dict())
        if new is model.layers[0]:
            continue
        new.input_layernorm.load_state_dict(source.input_layernorm.state_dict())
        checkpoint.copy_attention(source.self_attn, new.self_attn)
        read = source.input_layernorm(states[old])
        for norm, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            size = source.self_attn.get_submodule(projection)(read).float().square().mean().sqrt()
            new.self_attn.get_submodule(norm).weight.data.fill_(size)
    # features no louder than what the last layer read in the target
    model.hidden_norm.load_state_dict(source.input_layernorm.state_dict())
    model.norm.load_state_dict(target.model.norm.state_dict())
    model = model.to(target.device, target.dtype)
    checkpoint.lend(model, target)
    model = model.float()
    read = torch.cat([states[layer] for layer in features], -1).float()
    parametrize.register_parametrization(model.fc, "weight", Whitened(read))
    fc: Any = model.fc
    nn.init.normal_(fc.parametrizations.weight.original, std=read.shape[1] ** -0.5)
    _look_up(model)
    return model


@torch.no_grad()
def _copy_mlp(source: Any, new: Any, read: torch.Tensor) -> None:
    """Start ``new`` as the neurons of ``source`` that write most into the stream for ``read``."""
    down = source.down_proj.weight
    written = source.act_fn(source.gate_proj(read)) * source.up_proj(read)
    most = written.float().square().mean(0) * down.float().square().sum(0)
    kept = most.topk(new.up_proj.out_features).indices.sort().values
    new.gate_proj.weight.copy_(source.gate_proj.weight[kept])
    new.up_proj.weight.copy_(source.up_proj.weight[kept])
    new.down_proj.weight.copy_(down[:, kept])


class Whitened(nn.Module):
    """A float32 weight of features, held as that of the same with uncorrelated unit variance.

    Some numbers of the target's states are hundreds of times larger than others, and most of a
    state is the same at every position. A step of Adam is as large for each weight.

    Args:
        read: features `[rows, width]`.
    """

    def __init__(self, read: torch.Tensor) -> None:
        super().__init__()
        value, vector = torch.linalg.eigh(read.T @ read / len(read))
        size = value.clamp(min=float(value.mean()) * FLOOR).sqrt()
        self.register_buffer("whiten", vector / size @ vector.T, persistent=False)
        self.register_buffer("colour", vector * size @ vector.T, persistent=False)

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        """The weight that is applied to the features."""
        return original @ self.whiten  # type: ignore[operator]

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """What is trained, of a weight."""
        return weight @ self.colour  # type: ignore[operator]


@torch.no_grad()
def sample(target: PreTrainedModel) -> list[torch.Tensor]:
    """Hidden states `[rows, hidden]` of each layer over random ids, a sequence's first left out."""
    random = torch.Generator().manual_seed(0)
    size = target.config.get_text_config().vocab_size
    ids = torch.randint(size, SAMPLE, generator=random).to(target.device)
    states = target.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    return [state[:, 1:].flatten(0, 1) for state in states.hidden_states]


@torch.no_grad()
def _look_up(model: DFlash) -> None:
    """Let the first layer's masks attend to their anchor and become its embedding.

    The direction that maps embeddings of ``draft_ids`` to 1 and the mask's to 0 makes two numbers
    of a key, the same in each head, where rotation is slowest; ``fc`` leaves it out of the context,
    and a value uses it to take the mask's own embedding away. The other numbers of a key are small
    and random.
    """
    config: DFlashConfig = model.config
    first: Any = model.layers[0]
    fc: Any = model.fc
    attention: Attention = first.self_attn
    embedding = model.embed_tokens.weight.float()
    tokens, mask = (
        nn.functional.rms_norm(embedding[ids], embedding.shape[1:])
        for ids in (model.draft_ids.to(embedding.device), config.mask_token_id)
    )
    one = torch.eye(config.hidden_size, device=embedding.device)
    rows = torch.cat([tokens, len(tokens) ** 0.5 * mask[None]])
    known = torch.linalg.solve(rows.T @ rows + 10 * one, tokens.sum(0))
    fc.weight = fc.weight - torch.outer(known, known @ fc.weight) / known.square().sum()
    slowest = torch.tensor([config.head_dim // 2 - 1, config.head_dim - 1])
    for projection, direction in ((attention.q_proj, mask), (attention.k_proj, known)):
        # a norm follows: so large that a step of the optimizer does not undo it
        weight = projection.weight.normal_(std=0.1)
        direction = direction / direction.square().mean().sqrt()
        weight.unflatten(0, (-1, config.head_dim))[:, slowest] = direction.to(weight)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(SHARP)
    heads = torch.eye(*attention.v_proj.weight.shape, device=embedding.device)
    alone = one - torch.outer(embedding[config.mask_token_id], known) / LOUD
    attention.v_proj.weight.copy_(heads @ alone)
    attention.o_proj.weight.copy_(LOUD * heads.T)
    first.input_layernorm.weight.fill_(1.0)
