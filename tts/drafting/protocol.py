"""What the engine asks of a drafter, and what the learner asks of one that can be trained."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from tts.evidence import Rows
from tts.policy import Signals
from tts.sampling import Distribution, Warper

Draw = Callable[[Distribution, int], int]  # (q, absolute position) -> token
Prefix = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer


class Proposal(NamedTuple):
    """Drafted tokens and the distributions they were really drawn from."""

    tokens: list[int]
    q: list[Distribution]  # one a token
    signals: list[Signals]
    late: list[Distribution]  # of committed positions that had none, newest last


class Window(NamedTuple):
    """What a step learns from: evidence rows, the draft's inputs there, its context in front."""

    rows: Rows
    tokens: list[int]  # that the draft is fed
    prefix: Prefix  # the draft's keys and values before those, detached
    sight: int | None = None  # positions that the draft sees (None: all)


class Replay(NamedTuple):
    """What a draft says at the rows of a window."""

    logits: torch.Tensor  # [N, columns]
    row: torch.Tensor  # int64 [N] into the window's rows
    weight: torch.Tensor  # [N] of the loss, before it is normalised


class Drafter(Protocol):
    """Proposes tokens after a committed sequence and follows what was committed."""

    # hidden states of the target that come with what was committed, `[positions, layers x hidden]`
    layers: tuple[int, ...]

    @property
    def hears(self) -> int:
        """How many of a prompt's newest positions are worth the target's word on them."""
        ...

    def begin(self, warper: Callable[..., Warper]) -> None:
        """Start a generation: ``warper(columns)`` makes the warping function of this drafter."""
        ...

    def prefill(self, sequence: list[int], features: torch.Tensor | None) -> None:
        """Take in everything but the newest token of a prompt, and the features of what is new.

        What the target says there was heard before.
        """
        ...

    def at_hand(self, sequence: list[int]) -> float | None:
        """Confidence of the copy that `propose` would begin with (None: a model would draft)."""
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

    def catch_up(self, sequence: list[int], pending: int) -> list[Distribution]:
        """Rows of q for the newest ``pending`` >= 1 committed tokens, without drafting."""
        ...

    def commit(self, length: int, features: torch.Tensor | None) -> None:
        """The committed sequence now has ``length`` tokens; forget everything beyond.

        Args:
            length: tokens committed.
            features: of the positions that the target has read since the last call and that stay;
                the newest token is not among them.
        """
        ...

    def hear(self, logits: torch.Tensor, first: int) -> None:
        """What the target said at committed positions, in reading or verifying them.

        Args:
            logits: `[positions, vocab]`, before any warping.
            first: absolute position of the token that the first row predicted.
        """
        ...


class TrainableDrafter(Drafter, Protocol):
    """A drafter whose model can learn from windows of its own context."""

    targets: ClassVar[tuple[str, ...]]  # linear layers that are adapted unless others are named
    least_rows: ClassVar[int]  # of evidence that a window must have
    shares_keys: ClassVar[bool]  # adapting them leaves the cached keys of committed text valid

    @staticmethod
    def adaptable(model: Any) -> tuple[int, ...] | None:
        """Decoder layers of ``model`` that may be adapted (None: all)."""
        ...

    def window(self, sequence: list[int], rows: Rows) -> Window:
        """The drafter's inputs at ``rows``, and copies of its keys and values before them.

        What it has not read of those yet, it reads.
        """
        ...

    @staticmethod
    def replay(model: Any, window: Window) -> Replay:
        """What ``model``, of this drafter's kind, says at the window's rows, with its graph."""
        ...

    def bare(
        self, model: PreTrainedModel, sequence: list[int], window: Window, fresh: int, clean: bool
    ) -> torch.Tensor:
        """Logits of the bare draft ``model`` where `replay` predicts position ``fresh`` or later.

        Args:
            model: the draft without its adapter.
            sequence: all committed tokens.
            window: the rows asked for.
            fresh: absolute position.
            clean: the live draft is still the bare one.
        """
        ...

    def recompute(self, sequence: list[int], count: int) -> None:
        """Compute the newest ``count`` cached positions again, with the weights as they are."""
        ...
