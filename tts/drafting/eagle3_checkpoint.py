"""EAGLE-3 heads on disk: the authors' layout, AngelSlim's, and that of vLLM's speculators.

The authors' folders name the layer ``midlayer`` and hold no configuration of the head beyond the
width; speculators' name it ``layers.0`` and say everything. Both count the layers that are read as
transformers' ``hidden_states`` does; ``eagle_config`` of SpecForge counts layer outputs, one less.
What this program trains is written in the layout of speculators, without the head rows and the
embedding, which are the target's.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tts.drafting import checkpoint
from tts.drafting.eagle3_model import Eagle3, Eagle3Config
from tts.errors import UserError

ALGORITHM = "eagle3"
VARIANTS = ("norm_before_residual", "norm_output", "fc_norm", "norm_before_fc")


def recognises(config: dict[str, Any]) -> bool:
    """Whether ``config.json`` is that of an EAGLE-3 head."""
    if config.get("speculators_model_type") == ALGORITHM:
        return True
    names = config.get("architectures") or [""]
    # the authors' own folders say nothing but the width of the reduced vocabulary
    return "eagle3" in names[0].lower() or (
        "draft_vocab_size" in config and config.get("num_hidden_layers") == 1
    )


def read_layers(count: int) -> tuple[int, ...]:
    """The hidden states that the authors' heads read of a target with ``count`` layers."""
    return 2, count // 2, count - 3


def configure(published: dict[str, Any], text: PreTrainedConfig, folder: Path) -> Eagle3Config:
    """The configuration ``published`` in ``folder``, for a target with configuration ``text``.

    Raises:
        UserError: for a width or vocabulary that is not the target's, a layer that it does not
            have, or a setting that is missing.
    """
    try:
        config = _config(published, text, folder / "config.json")
    except KeyError as error:
        raise UserError(f"draft: {folder}/config.json lacks {error}: fetch it again") from None
    wanted = text.hidden_size, text.vocab_size
    checkpoint.check_target(config.target_hidden_size, config.vocab_size, wanted, folder)
    checkpoint.check_layers(config.target_layers, text.num_hidden_layers, folder)
    return config


def load(folder: Path, config: Eagle3Config, target: PreTrainedModel) -> Eagle3:
    """The head in ``folder`` for ``target``; errors as of `checkpoint.attach`."""
    tensors = {
        name.replace("midlayer.", "layers.0."): tensor
        for name, tensor in checkpoint.read_tensors(folder).items()
    }
    config.qk_norm = "layers.0.self_attn.q_norm.weight" in tensors
    head: Eagle3 = checkpoint.attach(Eagle3(config), tensors, target, folder)
    return head


def from_target(
    target: PreTrainedModel,
    ids: torch.Tensor,
    features: tuple[int, ...],
    layers: tuple[int, ...],
    fingerprint: str,
) -> Eagle3:
    """A new head that reads ``features`` and predicts ``ids`` with the rows of the target's head.

    It begins close to a draft made of the target's ``layers``: the first layer looks up the newest
    token and puts its embedding into the residual stream, where EAGLE-3 has only the features.
    """
    config = Eagle3Config(
        **checkpoint.new_config(target, ids, features, layers, fingerprint),
        # a few numbers of the states are thousands of times larger than the others
        fc_norm=True,
        norm_before_residual=True,
    )
    model = Eagle3(config)
    model.draft_ids = ids
    new: Any
    for new, old in zip(model.layers, layers, strict=True):
        source = target.model.layers[old]
        new.mlp.load_state_dict(source.mlp.state_dict())
        new.post_attention_layernorm.load_state_dict(source.post_attention_layernorm.state_dict())
        if not new.first:
            new.input_layernorm.load_state_dict(source.input_layernorm.state_dict())
            checkpoint.copy_attention(source.self_attn, new.self_attn)
    _look_up(model, target.get_input_embeddings().weight)
    model.norm.load_state_dict(target.model.norm.state_dict())
    model = model.to(target.device, target.dtype)
    checkpoint.lend(model, target)
    return model


@torch.no_grad()
def _look_up(model: Eagle3, embedding: torch.Tensor) -> None:
    """Let the first layer attend to the newest token and return its embedding."""
    first: Any = model.layers[0]
    width = model.config.hidden_size
    scale = float(embedding.float().square().mean().sqrt())
    sharp = 1.5  # the newest token's score, of itself, is 8 sharp^2 at 64 numbers a head
    attention = first.self_attn
    for projection, size in (
        (attention.q_proj, sharp), (attention.k_proj, sharp), (attention.v_proj, 1.0),
    ):  # fmt: skip
        own = projection.weight[:, :width]
        own.copy_(size * torch.eye(*own.shape))
    attention.o_proj.weight.copy_(scale * torch.eye(*attention.o_proj.weight.shape))
    first.hidden_norm.weight.fill_(scale)


def save(model: Eagle3, folder: Path) -> None:
    """Write the head (`checkpoint.write`)."""
    config: Eagle3Config = model.config
    published = {
        "speculators_model_type": ALGORITHM,
        "architectures": ["Eagle3Speculator"],
        "eagle_aux_hidden_state_layer_ids": list(config.target_layers),
        **{name: getattr(config, name) for name in VARIANTS},
    }
    checkpoint.write(model, model.state_dict(), published, "llama", folder)


def _config(published: dict[str, Any], text: PreTrainedConfig, file: Path) -> Eagle3Config:
    """The head's configuration from either layout."""
    asked = checkpoint.odd_attention(published.get("transformer_layer_config", published))
    own = published.get("eagle_config") or {}
    asked["use_aux_hidden_state: false"] = own.get("use_aux_hidden_state") is False
    checkpoint.refuse(asked, file)
    if "speculators_model_type" in published:
        layer = checkpoint.layer_config(published["transformer_layer_config"])
        width = published.get("target_hidden_size") or layer["hidden_size"]
        ids = published.get("eagle_aux_hidden_state_layer_ids")
        layers = tuple(ids) if ids else read_layers(text.num_hidden_layers)
        count = published["transformer_layer_config"].get("num_hidden_layers", 1)
    else:
        layer = checkpoint.layer_config(published)
        if not published.get("rope_scaling"):
            # the authors' training code takes no base from the configuration
            layer.pop("rope_parameters", None)
            layer["rope_theta"] = 10000.0
        width = published.get("target_hidden_size") or layer["hidden_size"]
        ids = own.get("eagle_aux_hidden_state_layer_ids")
        layers = tuple(i + 1 for i in ids) if ids else read_layers(text.num_hidden_layers)
        count = published.get("num_hidden_layers", 1)
    return Eagle3Config(
        **layer,
        num_hidden_layers=count,
        target_hidden_size=width,
        target_layers=layers,
        draft_vocab_size=published.get("draft_vocab_size") or layer["vocab_size"],
        tokenizer_fingerprint=published.get("tokenizer_fingerprint", ""),
        **{name: bool(published.get(name, False)) for name in VARIANTS},
    )
