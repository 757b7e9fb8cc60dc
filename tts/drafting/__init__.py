"""Drafters: what proposes tokens for the target to verify."""

from typing import Any, TypeAlias

from transformers import PreTrainedModel

from tts.cached_model import CachedModel
from tts.drafting.autoregressive import AutoregressiveDrafter
from tts.drafting.chain import ChainDrafter
from tts.drafting.dflash import DFlashDrafter
from tts.drafting.dflash_model import DFlash
from tts.drafting.eagle3 import Eagle3Drafter
from tts.drafting.eagle3_model import Eagle3
from tts.drafting.memory import Memory, Recall
from tts.drafting.pard import PardDrafter, mask_token
from tts.drafting.prompt_lookup import PromptLookup, PromptLookupDrafter
from tts.drafting.protocol import Drafter, TrainableDrafter
from tts.errors import UserError

Draft: TypeAlias = (
    PreTrainedModel | PromptLookup
)  # what a pair holds; a drafter is made from it per sequence


def make_drafter(
    draft: Draft,
    vocab_size: int,
    window: int | None = None,
    memory: Memory | None = None,
) -> Drafter:
    """A drafter with empty caches.

    Args:
        draft: the model, or the rule, that drafts.
        vocab_size: ids of the target.
        window: sliding window over a model's context (None: all of it; copies come from all of it).
        memory: of what the target said in like states of the draft (None: none).

    Raises:
        UserError: for the memory of a drafter that has no states.
    """
    if isinstance(draft, PromptLookup):
        if memory is not None:
            raise UserError("memory: prompt_lookup has no states to remember by: give a model")
        return PromptLookupDrafter(draft)
    drafter: Drafter = _family(draft)(draft, vocab_size, window)
    if memory is not None:
        assert isinstance(drafter, ChainDrafter)
        drafter.memory = Recall(memory, drafter.columns, vocab_size)
    return drafter


def trainable(draft: Draft) -> tuple[PreTrainedModel, type[TrainableDrafter]]:
    """The model that can learn while it drafts, and the drafter that replays it.

    Raises:
        UserError: if the draft is no model, or has recurrent layers.
    """
    if isinstance(draft, PromptLookup):
        raise UserError("distill: prompt_lookup copies, there is nothing to train: give a model")
    family = _family(draft)
    if issubclass(family, AutoregressiveDrafter) and CachedModel(draft).cache.is_recurrent:
        raise UserError(
            "distill: the draft has recurrent layers, whose past states are not kept: use a "
            "draft with attention only"
        )
    return draft, family


def _family(draft: PreTrainedModel) -> type[Any]:
    """The drafter that runs this kind of model."""
    if isinstance(draft, Eagle3):
        return Eagle3Drafter
    if isinstance(draft, DFlash):
        return DFlashDrafter
    return AutoregressiveDrafter if mask_token(draft) is None else PardDrafter
