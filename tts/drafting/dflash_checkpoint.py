"""DFlash drafters on disk: z-lab's layout and that of vLLM's speculators.

z-lab's ``dflash_config.target_layer_ids`` count layer outputs, speculators'
``aux_hidden_state_layer_ids`` count as transformers' ``hidden_states`` does, one more. What this
program trains is written in the layout of speculators, with a reduced vocabulary and without head
rows and embedding, which are the target's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tts.drafting import checkpoint
from tts.drafting.dflash_model import DFlash, DFlashConfig
from tts.errors import UserError

ALGORITHM = "dflash"
LENT = {"embed_tokens.weight", "lm_head.weight"}


def recognises(config: dict[str, Any]) -> bool:
    """Whether ``config.json`` is that of a DFlash drafter."""
    return "dflash_config" in config or config.get("speculators_model_type") == ALGORITHM


def read_layers(count: int, layers: int) -> tuple[int, ...]:
    """The hidden states that ``count`` features are taken from in a target with ``layers``."""
    if count == 1:
        return (layers // 2 + 1,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) + 1 for i in range(count))


def configure(folder: Path, text: PreTrainedConfig) -> DFlashConfig:
    """The configuration of the drafter in ``folder`` for a target with configuration ``text``.

    Raises:
        UserError: for a width or vocabulary that is not the target's, a layer that it does not
            have, a mask outside the vocabulary, or a variant that is not supported.
    """
    file = folder / "config.json"
    try:
        config = _config(checkpoint.read_config(file), file)
    except KeyError as error:
        raise UserError(f"draft: {file} lacks {error}: fetch it again") from None
    wanted = text.hidden_size, text.vocab_size
    checkpoint.check_target(config.target_hidden_size, config.vocab_size, wanted, folder)
    checkpoint.check_layers(config.target_layers, text.num_hidden_layers, folder)
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise UserError(
            f"draft: mask_token_id {config.mask_token_id} in {file} is outside the vocabulary of "
            f"{config.vocab_size}: use the draft of this target"
        )
    if config.block_size < 2:
        raise UserError(f"draft: block_size {config.block_size} in {file} drafts nothing: mend it")
    return config


def load(folder: Path, config: DFlashConfig, target: PreTrainedModel) -> DFlash:
    """The drafter in ``folder`` for ``target``, in its dtype and on its device.

    Raises:
        UserError: naming tensors that are missing, too many or misshapen.
    """
    tensors = checkpoint.read_tensors(folder)
    ids = checkpoint.draft_ids(tensors, config.draft_vocab_size, config.vocab_size, folder)
    model = DFlash(config)
    checkpoint.fill(model, tensors, LENT | {"draft_ids"}, folder)
    model.draft_ids = ids
    model = model.to(target.device, target.dtype)
    _borrow(model, target, LENT - tensors.keys())
    return model.eval().requires_grad_(False)


def from_target(
    target: PreTrainedModel,
    ids: torch.Tensor,
    features: tuple[int, ...],
    layers: tuple[int, ...],
    block_size: int,
    mask_token_id: int,
    fingerprint: str,
) -> DFlash:
    """A new drafter that reads ``features``, its layers begun as copies of the target's."""
    text = target.config.get_text_config()
    layer = checkpoint.layer_config(text.to_dict())
    # what a mask learns of its context comes through the values alone: let them be as wide
    layer["num_key_value_heads"] = layer["num_attention_heads"]
    config = DFlashConfig(
        **layer,
        num_hidden_layers=len(layers),
        target_hidden_size=text.hidden_size,
        target_layers=features,
        block_size=block_size,
        mask_token_id=mask_token_id,
        draft_vocab_size=len(ids),
        tokenizer_fingerprint=fingerprint,
    )
    model = DFlash(config)
    model.draft_ids = ids
    new: Any
    for new, old in zip(model.layers, layers, strict=True):
        source = target.model.layers[old]
        checkpoint.copy_attention(source.self_attn, new.self_attn)
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            new.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
    model.norm.load_state_dict(target.model.norm.state_dict())
    model = model.to(target.device, target.dtype)
    _borrow(model, target, LENT)
    return model


def save(model: DFlash, folder: Path) -> None:
    """Write the drafter in the layout of speculators, without what the target lends."""
    config: DFlashConfig = model.config
    folder.mkdir(parents=True, exist_ok=True)
    layer = checkpoint.layer_config(config.to_dict())
    published = {
        "speculators_model_type": ALGORITHM,
        "architectures": ["DFlashDraftModel"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "aux_hidden_state_layer_ids": list(config.target_layers),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "tokenizer_fingerprint": config.tokenizer_fingerprint,
        "transformer_layer_config": layer
        | {"model_type": "qwen3", "num_hidden_layers": config.num_hidden_layers},
    }
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    checkpoint.write(model, LENT, folder)


def _borrow(model: DFlash, target: PreTrainedModel, names: set[str]) -> None:
    if "embed_tokens.weight" in names:
        checkpoint.lend(model.embed_tokens, target.get_input_embeddings().weight)
    if "lm_head.weight" in names:
        rows = target.get_output_embeddings().weight.detach()[model.draft_ids]
        checkpoint.lend(model.lm_head, rows)


def _config(published: dict[str, Any], file: Path) -> DFlashConfig:
    """The drafter's configuration from either layout."""
    if "speculators_model_type" in published:
        inner, layer = published, published["transformer_layer_config"]
        layers = tuple(published["aux_hidden_state_layer_ids"])
    else:
        inner, layer = published["dflash_config"], published
        layers = tuple(i + 1 for i in inner["target_layer_ids"])
    kinds = set(layer.get("layer_types") or ()) - {"full_attention"}
    if kinds or inner.get("sample_from_anchor"):
        odd = ", ".join(sorted(kinds)) or "sample_from_anchor"
        raise UserError(f"draft: {file} asks for {odd}, which is not supported: use another draft")
    return DFlashConfig(
        **checkpoint.layer_config(layer),
        num_hidden_layers=layer["num_hidden_layers"],
        target_hidden_size=published.get("target_hidden_size") or layer["hidden_size"],
        target_layers=layers,
        block_size=published.get("block_size") or inner["block_size"],
        mask_token_id=inner["mask_token_id"],
        draft_vocab_size=published.get("draft_vocab_size") or layer["vocab_size"],
        tokenizer_fingerprint=published.get("tokenizer_fingerprint", ""),
    )
