"""Reading the folder of a draft that transformers does not know, before any model is built."""

import json
import pickle
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tts.errors import UserError

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
LENT = {"embed_tokens.weight", "lm_head.weight"}  # the target's, unless a head has its own

Tensors = dict[str, torch.Tensor]


def read_config(file: Path) -> dict[str, Any]:
    """A ``config.json``.

    Raises:
        UserError: if it is not a JSON object.
    """
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"draft: {file} is not JSON ({error}): fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"draft: {file} holds no settings: fetch it again")
    return config


def read_tensors(folder: Path) -> Tensors:
    """The folder's weights, from safetensors where there are any; nothing in them is executed.

    Raises:
        UserError: no weights, damaged ones, or a pickle that is more than tensors.
    """
    try:
        if (folder / WEIGHTS).is_file():
            return load_file(folder / WEIGHTS)
        return dict(torch.load(folder / PICKLED, weights_only=True, map_location="cpu"))
    except FileNotFoundError:
        raise UserError(
            f"draft: {folder} has neither {WEIGHTS} nor {PICKLED}: fetch it whole"
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"draft: {folder / PICKLED} holds more than tensors and is not opened: get the draft "
            "as safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"draft: the weights in {folder} are damaged ({error})") from None


def fill(model: nn.Module, tensors: Tensors, optional: set[str], folder: Path) -> None:
    """Load ``tensors`` into ``model``; only those named in ``optional`` may be absent.

    Raises:
        UserError: naming the tensors that are missing, too many or of another shape.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - tensors.keys() - optional)
    extra = sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"draft: {folder} lacks the tensors {missing} and has {extra} too many: fetch it whole"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"draft: {name} in {folder} is {list(tensor.shape)}, its config.json makes it "
                f"{list(own[name].shape)}: fetch both from the same place"
            )
    model.load_state_dict(tensors, strict=False)


def attach(model: Any, tensors: Tensors, target: PreTrainedModel, folder: Path) -> Any:
    """``model`` with ``tensors``, and what they lack lent by ``target``, in its dtype and place.

    Raises:
        UserError: naming tensors that are missing, too many or misshapen, ids outside the target's
            vocabulary, or an embedding that is lacking where the widths differ.
    """
    config = model.config
    ids = draft_ids(tensors, config.draft_vocab_size, config.vocab_size, folder)
    fill(model, tensors, LENT | {"draft_ids"}, folder)
    model.draft_ids = ids
    model = model.to(target.device, target.dtype)
    lend(model, target, LENT - tensors.keys())
    return model.eval().requires_grad_(False)


def lend(model: Any, target: PreTrainedModel, names: Set[str] = LENT) -> None:
    """Let ``model`` use the target's embedding and the head rows of its ids, frozen.

    Raises:
        UserError: if the embedding is of another width.
    """
    if "embed_tokens.weight" in names:
        embedding, width = target.get_input_embeddings().weight, model.config.hidden_size
        if embedding.shape[1] != width:
            raise UserError(
                f"draft: it is {width} wide and has no embedding of its own, the target's is "
                f"{embedding.shape[1]} wide: use the draft of this target"
            )
        model.embed_tokens.weight = nn.Parameter(embedding.detach(), requires_grad=False)
    if "lm_head.weight" in names:
        rows = target.get_output_embeddings().weight.detach()[model.draft_ids]
        model.lm_head.weight = nn.Parameter(rows, requires_grad=False)


def refuse(asked: dict[str, Any], file: Path) -> None:
    """Raise UserError, naming what a configuration asks for that these models cannot do.

    Args:
        asked: by name; None, false, zero and a factor of 1 ask for nothing.
        file: the configuration.
    """
    odd = sorted(k for k, value in asked.items() if value is True or value not in (None, 0, 1))
    if odd:
        raise UserError(
            f"draft: {file} asks for {', '.join(odd)}, which is not supported: use another draft"
        )


def odd_attention(layer: dict[str, Any]) -> dict[str, Any]:
    """What a layer's configuration asks for beside full attention with all of a head rotated."""
    kinds = layer.get("layer_types") or [layer.get("use_sliding_window") and "use_sliding_window"]
    rope = layer.get("rope_parameters") or layer
    return {kind: kind for kind in kinds if kind != "full_attention"} | {
        "partial_rotary_factor": rope.get("partial_rotary_factor")
    }


def draft_ids(tensors: Tensors, size: int, vocab: int, folder: Path) -> torch.Tensor:
    """Target ids `[size]` of the draft's columns from ``d2t``, which holds offsets to the index.

    Raises:
        UserError: if an id lies outside the target's vocabulary, or nothing says which they are.
    """
    tensors.pop("t2d", None)  # says the same the other way round
    if "d2t" not in tensors and size != vocab:
        raise UserError(
            f"draft: {folder} drafts {size} of {vocab} ids and lacks d2t, which names them: fetch "
            "it whole"
        )
    offsets = tensors.pop("d2t", torch.zeros(size, dtype=torch.long)).long()
    ids = torch.arange(len(offsets)) + offsets
    if len(ids) != size or not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise UserError(
            f"draft: d2t in {folder} names {len(ids)} ids up to {int(ids.max())}, config.json says "
            f"{size} of {vocab}: fetch both from the same place"
        )
    return ids


def vocabulary_maps(ids: torch.Tensor, vocab: int) -> Tensors:
    """``d2t`` and ``t2d`` as published checkpoints hold them."""
    ids = ids.cpu()
    known = torch.zeros(vocab, dtype=torch.bool)
    known[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": known}


def check_target(width: int, vocab: int, wanted: tuple[int, int], folder: Path) -> None:
    """Raise UserError if a draft was made for states or ids that are not the target's."""
    if (width, vocab) != wanted:
        raise UserError(
            f"draft: {folder} reads states {width} wide over {vocab} ids, the target has "
            f"{wanted[0]} and {wanted[1]}: use the draft of this target"
        )


def check_layers(layers: tuple[int, ...], count: int, folder: Path) -> None:
    """Raise UserError if a hidden state that is read lies outside a target of ``count`` layers."""
    if not layers or not 0 <= min(layers) <= max(layers) <= count:
        raise UserError(
            f"draft: {folder} reads the hidden states {list(layers)}, the target has 0 to {count}: "
            "use the draft of this target"
        )


LAYER_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings",
    "vocab_size", "attention_bias", "mlp_bias", "hidden_act",
)  # fmt: skip


def layer_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says about a decoder layer."""
    return {name: config[name] for name in LAYER_FIELDS if config.get(name) is not None}


def new_config(
    target: PreTrainedModel,
    ids: torch.Tensor,
    features: tuple[int, ...],
    layers: tuple[int, ...],
    fingerprint: str,
) -> dict[str, Any]:
    """Fields of a new head that reads ``features`` and predicts ``ids``, a layer for each given."""
    text = target.config.get_text_config()
    layer = layer_config(text.to_dict())
    # what a row learns of a token or of the context comes through the values: let them be as wide
    layer["num_key_value_heads"] = layer["num_attention_heads"]
    return layer | {
        "num_hidden_layers": len(layers),
        "target_hidden_size": text.hidden_size,
        "target_layers": features,
        "draft_vocab_size": len(ids),
        "tokenizer_fingerprint": fingerprint,
    }


def write(model: Any, own: Tensors, published: dict[str, Any], kind: str, folder: Path) -> None:
    """Write a head in the layout of speculators, in bfloat16, without what the target lends.

    Args:
        model: the head.
        own: its tensors; those that the target lends are left out.
        published: what is special about its configuration.
        kind: transformers' ``model_type`` of its layers.
        folder: made if it is not there.
    """
    config = model.config
    layer = layer_config(config.to_dict())
    published = published | {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "tokenizer_fingerprint": config.tokenizer_fingerprint,
        "transformer_layer_config": layer
        | {"model_type": kind, "num_hidden_layers": config.num_hidden_layers},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous()
        for name, tensor in own.items()
        if name not in LENT | {"draft_ids"}
    }
    tensors |= vocabulary_maps(model.draft_ids, model.config.vocab_size)
    save_file(tensors, folder / WEIGHTS)


def copy_attention(source: Any, new: Any) -> None:
    """Start ``new`` as the attention ``source``, whose key heads are repeated if ``new`` has more.

    Norms that only ``new`` has stay as they are.
    """
    for name, parameter in source.named_parameters():
        own = new.get_parameter(name)
        if own.shape != parameter.shape:
            heads = parameter.detach().unflatten(0, (-1, new.head_dim))
            parameter = heads.repeat_interleave(len(own) // len(parameter), 0).flatten(0, 1)
        own.data.copy_(parameter)
