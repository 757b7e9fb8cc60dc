"""Drafters: what proposes tokens for the target to verify."""

from typing import TypeAlias

from transformers import PreTrainedModel

from tts.drafting.autoregressive import AutoregressiveDrafter
from tts.drafting.pard import PardDrafter, mask_token
from tts.drafting.prompt_lookup import PromptLookup, PromptLookupDrafter
from tts.drafting.protocol import Drafter

Draft: TypeAlias = (
    PreTrainedModel | PromptLookup
)  # what a pair holds; a drafter is made from it per sequence


def make_drafter(draft: Draft, vocab_size: int, window: int | None = None) -> Drafter:
    """A drafter with empty caches.

    Args:
        draft: the model, or the rule, that drafts.
        vocab_size: ids of the target.
        window: sliding window over the draft's context (None: the whole context).
    """
    if isinstance(draft, PromptLookup):
        return PromptLookupDrafter(draft, window)
    family = AutoregressiveDrafter if mask_token(draft) is None else PardDrafter
    return family(draft, vocab_size, window)
