"""Reading the folder of a draft that transformers does not know, before any model is built."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tts.errors import UserError

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"

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


def lend(parameter_of: nn.Module, weight: torch.Tensor) -> None:
    """Let a module use a weight of the target, frozen."""
    parameter_of.weight = nn.Parameter(weight.detach(), requires_grad=False)


def draft_ids(tensors: Tensors, size: int, vocab: int, folder: Path) -> torch.Tensor:
    """Target ids `[size]` of the draft's columns from ``d2t``, which holds offsets to the index.

    Raises:
        UserError: if an id lies outside the target's vocabulary.
    """
    tensors.pop("t2d", None)  # says the same the other way round
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


def write(model: Any, lent: set[str], folder: Path) -> None:
    """Write the tensors that are the draft's own, in bfloat16, and its vocabulary."""
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in lent | {"draft_ids"}
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
