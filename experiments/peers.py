"""transformers' own ways to decode, as arms of `tts bench`."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from experiments.options import ModelOptions
from tts.drafting.dflash_model import DFlash, DFlashConfig
from tts.models import shipped_drafts

Arm = Callable[[torch.Tensor, GenerationConfig, int, Any], None]  # prompt, how, seed, streamer


def peers(
    config: ModelOptions, target: PreTrainedModel, lengths: tuple[int, ...]
) -> dict[str, Arm]:
    """Plain, prompt lookup, and the assisted variants of every draft that transformers can run.

    It assists with causal language models, and has a DFlash generation of its own. A draft that is
    neither is stood in for by those that ship for the target.

    Args:
        config: of our own pair.
        target: with our kernels.
        lengths: constant speculation lengths.
    """
    names = filter(None, dict.fromkeys((config.draft, *shipped_drafts(config.target))))
    pairs = [config.load(name, config.compression, stock=True) for name in names]
    stock = pairs[0].target
    arms = {
        "plain": _arm(stock),
        "plain, our kernels": _arm(target),
        "prompt lookup": _arm(stock, prompt_lookup_num_tokens=10),
    }
    drafts = [pair.draft for pair in pairs]
    causal = next((draft for draft in drafts if isinstance(draft, GenerationMixin)), None)
    if causal is not None:
        # the default: up to 20 tokens, stopped by a confidence threshold that is refitted online
        arms["assisted, default"] = _arm(stock, causal)
        settings: dict[str, Any] = {"assistant_confidence_threshold": 0.0}
        for length in lengths:
            arms[f"assisted, constant {length}"] = _arm(
                stock, causal, num_assistant_tokens=length, **settings
            )
        arms["assisted, heuristic"] = _arm(
            stock, causal, num_assistant_tokens=5, num_assistant_tokens_schedule="heuristic",
            **settings,
        )  # fmt: skip
    block = next((draft for draft in drafts if isinstance(draft, DFlash)), None)
    theirs = None if block is None else transformers_dflash(block)
    if theirs is not None:
        arms["DFlash"] = _arm(stock, theirs, speculation_type="dflash")
    return {f"transformers, {name}": arm for name, arm in arms.items()}


def transformers_dflash(draft: DFlash) -> PreTrainedModel | None:
    """The model of transformers' own DFlash generation with the layers of ``draft``.

    It predicts with the whole head of the target. None where this transformers has none, or the
    draft is not as wide as its target.
    """
    try:
        from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
    except ImportError:
        return None
    own: DFlashConfig = draft.config
    if own.target_hidden_size != own.hidden_size:
        return None
    shared = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters",
        "max_position_embeddings", "hidden_act", "block_size", "mask_token_id",
    )  # fmt: skip
    config = MuseGlimmerAssistantConfig(
        **{name: getattr(own, name) for name in shared},
        # theirs counts layers from 0, not from the embedding
        target_layer_ids=[layer - 1 for layer in own.target_layers],
        layer_types=["full_attention"] * own.num_hidden_layers,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    made = MuseGlimmerAssistantModel(config).to(draft.device, draft.dtype)
    names = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    lent = ("embed_tokens", "lm_head", "draft_ids")
    made.load_state_dict(
        {
            names.get(name, name): value
            for name, value in draft.state_dict().items()
            if not name.startswith(lent)
        }
    )
    return made.eval()


def _arm(target: PreTrainedModel, draft: PreTrainedModel | None = None, **settings: Any) -> Arm:
    """transformers' `generate`; what concerns a causal draft is read off its own config."""
    drafting = None
    if isinstance(draft, GenerationMixin):
        drafting = GenerationConfig.from_dict(draft.generation_config.to_dict() | settings)
        settings = {}

    def arm(prompt: torch.Tensor, config: GenerationConfig, seed: int, streamer: Any) -> None:
        torch.manual_seed(seed)
        if drafting is not None:
            draft.generation_config = drafting
        own = GenerationConfig.from_dict(config.to_dict() | settings)
        target.generate(prompt, generation_config=own, assistant_model=draft, streamer=streamer)

    return arm
