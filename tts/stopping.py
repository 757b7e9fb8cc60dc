"""Where a block of new tokens ends the generation: end-of-sequence, stop string, or a criterion."""

import time
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from tts.settings import Limits, Sampling


class Cut(NamedTuple):
    """How many of the new tokens stay, and why nothing comes after them."""

    kept: int
    reason: str | None  # "eos", "stop", "length", "time" or None: go on


class Stopping:
    """Looks at every new token, so that a stop inside a block is found where it is.

    Args:
        sampling: for the end-of-sequence ids.
        limits: the rest.
        tokenizer: needed for stop strings.
        criteria: further criteria of transformers, asked once a token with ``scores=None``.
    """

    def __init__(
        self,
        sampling: Sampling,
        limits: Limits,
        tokenizer: PreTrainedTokenizerBase,
        criteria: StoppingCriteriaList | None = None,
    ) -> None:
        self._eos, self._limits = sampling.eos_token_ids, limits
        self._criteria = StoppingCriteriaList(criteria or [])
        if limits.stop_strings:
            self._criteria.append(StopStringCriteria(tokenizer, list(limits.stop_strings)))
        self._began = time.monotonic()

    def cut(self, sequence: list[int], new: list[int], generated: int) -> Cut:
        """Cut ``new`` tokens that follow ``sequence``, of which ``generated`` are generated."""
        for i, token in enumerate(new):
            if token in self._eos:
                return Cut(i + 1, "eos")
            if self._criteria:
                so_far = torch.tensor([sequence + new[: i + 1]])
                if bool(self._criteria(so_far, None).all()):  # type: ignore[arg-type]
                    return Cut(i + 1, "stop")
            if generated + i + 1 == self._limits.max_new_tokens:
                return Cut(i + 1, "length")
        limit = self._limits.max_time
        if limit is not None and time.monotonic() - self._began > limit:
            return Cut(len(new), "time")
        return Cut(len(new), None)
