"""Drafting token after token: what all drafters share that see their own drafts."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from tts.drafting.protocol import Draw, Proposal
from tts.policy import Signals, signals
from tts.sampling import Distribution, Warper, join


class ChainDrafter(ABC):
    """Draws a token from a row, reads it, and goes on from the next row."""

    columns: torch.Tensor | None  # token id of each logit column (None: the column itself)
    longest: int | None = None  # drafts of a round (None: any number)

    def begin(self, warper: Callable[..., Warper]) -> None:
        self._warp = warper(self.columns)

    def propose(
        self,
        sequence: list[int],
        gamma: int,
        pending: int,
        draw: Draw,
        proceed: Callable[[Signals], bool],
    ) -> Proposal:
        gamma = min(gamma, self.longest or gamma)
        logits = self._first_rows(sequence, gamma, pending)
        start = len(sequence)
        warped = self._warp(logits, sequence, start - pending)
        late = warped[:pending] if pending else None
        tokens: list[int] = []
        drawn: list[Distribution] = []
        said: list[Signals] = []
        logits, q = logits[pending:], warped[pending:]
        while True:
            token = draw(q, start + len(tokens))
            probability = float(q.of(q.ids.new_tensor([[token]])))
            said.append(signals(logits[0], len(tokens), probability))
            tokens.append(token)
            drawn.append(q)
            if len(tokens) == gamma or not proceed(said[-1]):
                return Proposal(tokens, join(drawn), said, late)
            logits = self._next_row(tokens)
            q = self._warp(logits, sequence + tokens, start + len(tokens))

    def catch_up(self, sequence: list[int], pending: int) -> Distribution:
        return self._warp(self._late_rows(sequence, pending), sequence, len(sequence) - pending)

    @abstractmethod
    def _first_rows(self, sequence: list[int], gamma: int, pending: int) -> torch.Tensor:
        """Logits `[pending + 1, columns]` for the pending positions and the first draft."""

    @abstractmethod
    def _next_row(self, tokens: list[int]) -> torch.Tensor:
        """Logits `[1, columns]` for the draft after ``tokens``, the drafts so far."""

    @abstractmethod
    def _late_rows(self, sequence: list[int], pending: int) -> torch.Tensor:
        """Logits `[pending, columns]` for the pending positions, without reading the newest."""
