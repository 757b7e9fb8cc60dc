"""A small Llama that predicts only the ids it is worth predicting.

The draft borrows the target's embedding and the rows of the target's head that belong to its
``draft_ids``; only its own layers are stored. It is still an ordinary causal language model of
transformers: by default the logits are scattered to full width with -inf, so that any peer can run
it as an assistant.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tts.drafting import checkpoint


class ReducedLlamaConfig(LlamaConfig):
    """`LlamaConfig` plus what ties the draft to its target.

    Args:
        draft_vocab_size: number of ids the head predicts.
        tokenizer_fingerprint: of the target's tokenizer (`tts.vocabulary.fingerprint`).
        pard_token: the id that masks are, if it was trained to draft in parallel.
    """

    model_type = "reduced_llama"

    draft_vocab_size: int = 0
    tokenizer_fingerprint: str = ""
    pard_token: int | None = None


class ReducedLlamaForCausalLM(PreTrainedModel, GenerationMixin):
    """Llama body with the target's embedding and a head over ``draft_ids`` `[draft_vocab_size]`."""

    config_class = ReducedLlamaConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    draft_ids: torch.Tensor

    def __init__(self, config: ReducedLlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("draft_ids", torch.arange(config.draft_vocab_size))
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        full_width: bool = True,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, rows, vocab]` with -inf outside ``draft_ids``.

        Args:
            input_ids: `[batch, rows]`.
            attention_mask: named here because `generate` looks for the name: without it an
                assistant reads its whole context again in every round.
            logits_to_keep: only the last rows (0: all).
            full_width: False leaves the logits at `[batch, rows, draft_vocab_size]`.
        """
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        if full_width:
            wide = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
            logits = wide.index_copy_(-1, self.draft_ids, logits)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


AutoConfig.register(ReducedLlamaConfig.model_type, ReducedLlamaConfig)


def attach(draft: ReducedLlamaForCausalLM, target: PreTrainedModel) -> ReducedLlamaForCausalLM:
    """Lend ``draft`` the target's embedding, and the head rows of its ids; nothing is trained."""
    embedding = target.get_input_embeddings().weight
    head = target.get_output_embeddings().weight
    draft.model.embed_tokens.weight = nn.Parameter(embedding.detach(), requires_grad=False)
    rows = head.detach()[draft.draft_ids.to(head.device)]
    draft.lm_head.weight = nn.Parameter(rows, requires_grad=False)
    return draft


def from_target(
    target: PreTrainedModel, draft_ids: torch.Tensor, layers: list[int], fingerprint: str
) -> ReducedLlamaForCausalLM:
    """A new draft whose layers start as copies of the target's ``layers``."""
    text = target.config.get_text_config().to_dict()
    for key in ("model_type", "architectures", "num_hidden_layers", "_name_or_path", "dtype"):
        text.pop(key, None)
    config = ReducedLlamaConfig(
        **text,
        num_hidden_layers=len(layers),
        draft_vocab_size=len(draft_ids),
        tokenizer_fingerprint=fingerprint,
        attn_implementation=target.config._attn_implementation,
    )
    draft = ReducedLlamaForCausalLM(config).to(target.device, target.dtype)
    draft.draft_ids = draft_ids.to(target.device)
    for new, old in enumerate(layers):
        draft.model.layers[new].load_state_dict(target.model.layers[old].state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    return attach(draft, target)


def save(draft: ReducedLlamaForCausalLM, folder: Path) -> None:
    """Write ``config.json`` and the tensors that are the draft's own, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor.to(torch.int32)
        for name, tensor in draft.state_dict().items()
        if name not in ("model.embed_tokens.weight", "lm_head.weight")
    }
    draft.config.save_pretrained(folder)
    save_file({k: v.contiguous().cpu() for k, v in own.items()}, folder / checkpoint.WEIGHTS)


def recognises(config: dict[str, Any]) -> bool:
    """Whether ``config.json`` is that of a reduced draft."""
    return config.get("model_type") == ReducedLlamaConfig.model_type


def configure(
    published: dict[str, Any], text: PreTrainedConfig, folder: Path
) -> ReducedLlamaConfig:
    """The configuration ``published`` in ``folder``, for a target with configuration ``text``.

    Raises:
        UserError: if the target is of another width.
    """
    config: ReducedLlamaConfig = ReducedLlamaConfig.from_dict(published)
    own = config.hidden_size, config.vocab_size
    checkpoint.check_target(*own, (text.hidden_size, text.vocab_size), folder)
    return config


def load(
    folder: Path, config: ReducedLlamaConfig, target: PreTrainedModel
) -> ReducedLlamaForCausalLM:
    """The draft in ``folder``, attached to ``target``, in the target's dtype and device.

    Raises:
        UserError: naming the tensors that are missing, too many or misshapen.
    """
    config._attn_implementation = target.config._attn_implementation
    draft = ReducedLlamaForCausalLM(config)
    tensors = checkpoint.read_tensors(folder)
    checkpoint.fill(draft, tensors, {"model.embed_tokens.weight", "lm_head.weight"}, folder)
    draft.draft_ids = draft.draft_ids.long()
    return attach(draft.to(target.device, target.dtype), target).eval()
