"""DFlash drafters on disk: z-lab's layout and that of vLLM's speculators.

z-lab's ``dflash_config.target_layer_ids`` count layer outputs, speculators'
``aux_hidden_state_layer_ids`` count as transformers' ``hidden_states`` does, one more. What this
program trains is written in the layout of speculators, with a reduced vocabulary and without head
rows and embedding, which are the target's.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from tts.drafting import checkpoint
from tts.drafting.dflash_model import DFlash, DFlashConfig
from tts.errors import UserError

ALGORITHM = "dflash"


def recognises(config: dict[str, Any]) -> bool:
    """Whether ``config.json`` is that of a DFlash drafter."""
    return "dflash_config" in config or config.get("speculators_model_type") == ALGORITHM


def read_layers(count: int, layers: int) -> tuple[int, ...]:
    """The hidden states that ``count`` features are taken from in a target with ``layers``."""
    if count == 1:
        return (layers // 2 + 1,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) + 1 for i in range(count))


def configure(published: dict[str, Any], text: PreTrainedConfig, folder: Path) -> DFlashConfig:
    """The configuration ``published`` in ``folder``, for a target with configuration ``text``.

    Raises:
        UserError: for a width or vocabulary that is not the target's, a layer that it does not
            have, a mask outside the vocabulary, or a variant that is not supported.
    """
    file = folder / "config.json"
    try:
        config = _config(published, file)
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
    """The drafter in ``folder`` for ``target``; errors as of `checkpoint.attach`."""
    tensors = checkpoint.read_tensors(folder)
    drafter: DFlash = checkpoint.attach(DFlash(config), tensors, target, folder)
    return drafter


def save(model: DFlash, folder: Path) -> None:
    """Write the drafter (`checkpoint.write`)."""
    config: DFlashConfig = model.config
    published = {
        "speculators_model_type": ALGORITHM,
        "architectures": ["DFlashDraftModel"],
        "aux_hidden_state_layer_ids": list(config.target_layers),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
    }
    tensors = {k: v for k, v in model.state_dict().items() if "parametrizations" not in k}
    checkpoint.write(
        model, tensors | {"fc.weight": model.fc.weight.detach()}, published, "qwen3", folder
    )


# of a block: where its first draft comes from, whether its rows see each other, and scales
UNSUPPORTED = (
    "sample_from_anchor", "shift_label", "is_causal", "final_logit_softcapping",
    "output_multiplier", "input_embedding_scale",
)  # fmt: skip


def _config(published: dict[str, Any], file: Path) -> DFlashConfig:
    """The drafter's configuration from either layout."""
    if "speculators_model_type" in published:
        inner, layer = published, published["transformer_layer_config"]
        layers = tuple(published["aux_hidden_state_layer_ids"])
    else:
        inner, layer = published["dflash_config"], published
        layers = tuple(i + 1 for i in inner["target_layer_ids"])
    asked = {name: inner.get(name) for name in UNSUPPORTED}
    asked["domino"] = inner.get("projector_type") == "domino"
    checkpoint.refuse(asked | checkpoint.odd_attention(layer), file)
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
