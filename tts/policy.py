"""The contract between the engine and a length policy; the policies live in `controllers`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch


class RoundState(NamedTuple):
    """What is known before a round."""

    position: int  # generated tokens so far
    context_length: int  # tokens in the sequence, prompt included
    limit: int  # largest gamma that still fits the budget and the context
    at_hand: float | None = None  # confidence of the copy that would come first (None: no copy)


class Signals(NamedTuple):
    """What the draft itself says about a token it has just drafted."""

    offset: int  # index of the token in its block
    entropy: float  # nats, of the draft's softmax at temperature 1, before warping
    confidence: float  # largest probability of that softmax
    probability: float  # of the drafted token under the warped q
    token: int = -1  # the drafted token
    # [hidden], the draft's state that the token was drawn from, after the token before it was fed;
    # None where no model drafts
    hidden: torch.Tensor | None = None
    copied: bool = False  # no model has drafted it
    following: float | None = None  # confidence of the copy that would come next (None: no copy)


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What a verified round taught. The label of offset j need not be the accepted bit.

    ``acceptance()[j]`` is the probability, given p and q, that the token at offset j is accepted if
    those before it are (`AcceptanceRule.probability`), known for the offsets that lie on the
    committed path: all accepted ones and the first rejected one. It is computed when asked for:
    that is policy time.
    """

    state: RoundState
    num_accepted: int
    signals: list[Signals] = field(default_factory=list)
    acceptance: Callable[[], list[float]] = list
    draft_ms: float = 0.0
    verify_ms: float = 0.0

    @property
    def num_drafted(self) -> int:
        return len(self.signals)


class LengthPolicy(Protocol):
    """Chooses how many tokens to draft."""

    def plan(self, state: RoundState) -> int:
        """Cap for this round, 0..state.limit; 0 means: one token from the target alone."""
        ...

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        """Whether to draft another token; the newest one stays drafted either way."""
        ...

    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a verified round."""
        ...

    def reset(self) -> None:
        """Forget everything that belongs to one sequence."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `load_state_dict` needs to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        ...


def signals(
    logits: torch.Tensor, hidden: torch.Tensor, offset: int, probability: float, token: int
) -> Signals:
    """Signals of one drafted ``token`` from its raw ``logits`` `[columns]` and their input."""
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum()
    confidence = float(log_probs.max().exp())
    return Signals(offset, float(entropy), confidence, probability, token, hidden)
