"""Tiny random models for unit tests: architectures as published, weights random but peaked."""

import copy
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)

import tts.attention  # noqa: F401  registers "tts"
from tts.models import ModelPair

CHARACTERS = "<>" + string.ascii_letters + string.digits

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def config(architecture: str, vocab: int = 64, layers: int = 2):
    """The configuration of a tiny ``llama3.1``, ``qwen3``, ``qwen3.5`` or ``sliding`` model."""
    common = COMMON | {"vocab_size": vocab, "num_hidden_layers": layers}
    if architecture == "llama3.1":
        return LlamaConfig(**common, rope_parameters=LLAMA31_ROPE)
    if architecture == "qwen3":
        return Qwen3Config(**common)
    if architecture == "sliding":
        return Qwen3Config(**common, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    kinds = ["linear_attention"] * (layers - 1) + ["full_attention"]
    return Qwen3_5TextConfig(**common, **HYBRID, layer_types=kinds)


def model(architecture: str, vocab: int = 64, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """A random float32 model whose distributions are neither flat nor point masses."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(
        config(architecture, vocab, layers), attn_implementation="tts"
    )
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.6 if "embed" in name or "lm_head" in name else 0.25)
    return made.eval().requires_grad_(False)


def noisy(target: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A draft: the target with relative noise on every weight."""
    draft = copy.deepcopy(target)
    torch.manual_seed(seed)
    for weight in draft.parameters():
        weight.add_(torch.randn_like(weight) * noise * weight.std().nan_to_num(0.1))
    return draft


def tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Token i is written as the single character ``CHARACTERS[i]``; the last id ends a turn."""
    ids = {character: i for i, character in enumerate(CHARACTERS[:vocab])}
    end = CHARACTERS[vocab - 1]
    raw = Tokenizer(models.BPE(ids, []))
    raw.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end)
    made.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}END{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    ).replace("END", end)
    return made


def pair(
    architecture: str = "llama3.1", noise: float = 0.3, vocab: int = 64, **kwargs
) -> ModelPair:
    """Target and noisy draft in float32."""
    target = model(architecture, vocab, **kwargs)
    return ModelPair(target, noisy(target, noise), tokenizer(vocab), f"tiny-{architecture}")


def save(made: PreTrainedModel, folder: Path, vocab: int = 64) -> Path:
    """Write model and tokenizer as an ordinary local folder."""
    made.save_pretrained(folder)
    tokenizer(vocab).save_pretrained(folder)
    return folder


def save_pair(target: PreTrainedModel, noise: float, root: Path) -> Path:
    """Write ``target`` and a noisy draft of it into ``root``."""
    save(target, root / "target")
    save(noisy(target, noise), root / "draft")
    return root
