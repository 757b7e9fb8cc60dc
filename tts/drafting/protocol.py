"""What the engine asks of a drafter."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from tts.cached_model import CachedModel
from tts.policy import Signals
from tts.sampling import Distribution, Warper

Draw = Callable[[Distribution, int], int]  # (row of q, absolute position) -> token


class Proposal(NamedTuple):
    """Drafted tokens and the distributions they were really drawn from."""

    tokens: list[int]
    q: Distribution | None  # one row a token; None without tokens
    signals: list[Signals]
    late: Distribution | None  # rows of committed positions that had none, newest last


class Drafter(Protocol):
    """Proposes tokens after a committed sequence and follows what was committed."""

    def begin(self, warper: Callable[..., Warper]) -> None:
        """Start a generation: ``warper(columns)`` makes the warping function of this drafter."""
        ...

    def prefill(self, sequence: list[int]) -> None:
        """Take in everything but the newest token of a prompt."""
        ...

    def propose(
        self,
        sequence: list[int],
        gamma: int,
        pending: int,
        draw: Draw,
        proceed: Callable[[Signals], bool],
    ) -> Proposal:
        """Draft up to ``gamma`` tokens after ``sequence``.

        Args:
            sequence: all committed tokens; the drafter may lag any number of them.
            gamma: at least 1.
            pending: so many newest committed tokens have no row of q yet; they come as ``late``.
            draw: chooses a token from a row.
            proceed: asked after each token but the last.
        """
        ...

    def catch_up(self, sequence: list[int], pending: int) -> Distribution:
        """Rows of q for the newest ``pending`` >= 1 committed tokens, without drafting."""
        ...

    def commit(self, length: int) -> None:
        """The committed sequence now has ``length`` tokens; forget everything beyond."""
        ...


class TrainableDrafter(Drafter, Protocol):
    """A drafter whose model can learn from windows of its own context."""

    def keys_values(self, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of the cached keys and values of the first ``length`` tokens, layer by layer.

        Under a sliding window, only of those that the token after them sees.
        """
        ...

    def lend(self, bare: CachedModel, length: int) -> None:
        """Fill the empty cache of ``bare``, which runs the same weights, with ``length`` tokens."""
        ...

    def recompute(self, sequence: list[int], count: int) -> None:
        """Compute the newest ``count`` cached positions again, with the weights as they are."""
        ...
