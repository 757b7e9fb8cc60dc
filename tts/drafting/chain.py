"""Drafting token after token: what all drafters share that see their own drafts."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from tts.cached_model import Rows
from tts.drafting.memory import Recall
from tts.drafting.protocol import Draw, Proposal
from tts.policy import Signals, signals
from tts.sampling import Distribution, Warper


class ChainDrafter(ABC):
    """Draws a token from a row, reads it, and goes on from the next row."""

    columns: torch.Tensor | None  # token id of each logit column (None: the column itself)
    longest: int | None = None  # drafts of a round (None: any number)
    memory: Recall | None = None  # of what the target said

    def begin(self, warper: Callable[..., Warper]) -> None:
        self._warp = warper(self.columns)

    @property
    def hears(self) -> int:
        return 0 if self.memory is None else self.memory.capacity

    def hear(self, logits: torch.Tensor, first: int) -> None:
        if self.memory is not None:
            self.memory.hear(logits, first)

    def at_hand(self, sequence: list[int]) -> float | None:
        return None

    def propose(
        self,
        sequence: list[int],
        gamma: int,
        pending: int,
        draw: Draw,
        proceed: Callable[[Signals], bool],
    ) -> Proposal:
        gamma = min(gamma, self.longest or gamma)
        start = len(sequence)
        rows = self._recall(self._first_rows(sequence, gamma, pending), start - pending)
        warped = self._warp(rows.logits, sequence, start - pending)
        late, q = warped[:-1], warped[-1]
        tokens: list[int] = []
        drawn: list[Distribution] = []
        said: list[Signals] = []
        while True:
            token = draw(q, start + len(tokens))
            row = rows.logits[-1], rows.hidden[-1]  # what q was made of
            said.append(signals(*row, len(tokens), q.of(token), token))
            tokens.append(token)
            drawn.append(q)
            if len(tokens) == gamma or not proceed(said[-1]):
                return Proposal(tokens, drawn, said, late)
            rows = self._recall(self._next_row(tokens), start + len(tokens))
            q = self._warp(rows.logits, sequence + tokens, start + len(tokens))[0]

    def catch_up(self, sequence: list[int], pending: int) -> list[Distribution]:
        first = len(sequence) - pending
        rows = self._recall(self._late_rows(sequence, pending), first)
        return self._warp(rows.logits, sequence, first)

    def _see(self, states: torch.Tensor, end: int) -> None:
        if self.memory is not None:
            self.memory.see(states, end - len(states))

    def _recall(self, rows: Rows, first: int) -> Rows:
        # a draft that learning has broken says nothing, until the guard takes that back
        rows = Rows(*(x.nan_to_num(0.0, 0.0, 0.0) for x in (rows.hidden, rows.logits)))
        return rows if self.memory is None else self.memory.recall(rows, first)

    @abstractmethod
    def _first_rows(self, sequence: list[int], gamma: int, pending: int) -> Rows:
        """The `pending + 1` rows for the pending positions and the first draft."""

    @abstractmethod
    def _next_row(self, tokens: list[int]) -> Rows:
        """The single row for the draft after ``tokens``, the drafts so far."""

    @abstractmethod
    def _late_rows(self, sequence: list[int], pending: int) -> Rows:
        """The rows for the pending positions, without reading the newest."""
