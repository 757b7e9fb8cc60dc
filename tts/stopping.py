"""Where a block of new tokens ends the generation: end-of-sequence, stop string, or a criterion."""

import time
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from tts.errors import UserError
from tts.settings import Limits, Sampling


class Cut(NamedTuple):
    """How many of the new tokens stay, and why nothing comes after them."""

    kept: int
    reason: str | None  # "eos", "stop", "time" or None: go on


class Stopping:
    """Looks at every new token, so that a stop inside a block is found where it is.

    Args:
        sampling: for the end-of-sequence ids.
        limits: the stop strings and the time; the engine counts the tokens.
        tokenizer: needed for stop strings.
        criteria: further criteria of transformers, asked once a token with ``scores=None``.

    Raises:
        UserError: for a stop string that cannot be looked for.
    """

    def __init__(
        self,
        sampling: Sampling,
        limits: Limits,
        tokenizer: PreTrainedTokenizerBase,
        criteria: StoppingCriteriaList | None = None,
    ) -> None:
        self._eos, self._max_time = sampling.eos_token_ids, limits.max_time
        self._criteria = StoppingCriteriaList(criteria or [])
        if limits.stop_strings:
            try:
                self._criteria.append(StopStringCriteria(tokenizer, list(limits.stop_strings)))
            except ValueError as error:
                raise UserError(
                    f"stop_strings: {list(limits.stop_strings)} cannot be looked for ({error}): "
                    "leave out what is empty"
                ) from None
        self._began = time.monotonic()

    def cut(self, sequence: list[int], new: list[int]) -> Cut:
        """Cut ``new`` tokens that follow ``sequence``."""
        whole = torch.tensor([sequence + new]) if self._criteria else None
        for i, token in enumerate(new):
            if token in self._eos:
                return Cut(i + 1, "eos")
            if whole is not None:
                so_far = whole[:, : len(sequence) + i + 1]
                if bool(self._criteria(so_far, None).all()):  # type: ignore[arg-type]
                    return Cut(i + 1, "stop")
        if self._max_time is not None and time.monotonic() - self._began > self._max_time:
            return Cut(len(new), "time")
        return Cut(len(new), None)
