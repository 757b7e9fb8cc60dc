"""What the target said the last times the draft was in a like state, mixed into what it says now.

A cache of the text itself, as in neural caches (Grave, Joulin, Usunier 2017) and kNN-LM (Khandelwal
et al. 2020), with two differences: a value is not the token that came but the target's whole
distribution, which every verification computes, and likeness decides how much it counts.
"""

from dataclasses import dataclass
from math import log

import torch
from torch.nn.functional import normalize

from tts.cached_model import Rows
from tts.errors import UserError


@dataclass(frozen=True)
class Memory:
    """What is remembered of a sequence, and how it is used.

    Args:
        capacity: newest committed positions that are remembered.
        width: ids of the target's distribution that are kept of each.
        neighbours: remembered positions that a row looks up.
        sharpness: how fast a neighbour's weight falls with its unlikeness.
        prior: weight of the draft's own word, beside 1 for a neighbour in the very same state.

    Raises:
        UserError: for a setting that remembers nothing.
    """

    capacity: int = 512
    width: int = 32
    neighbours: int = 4
    sharpness: float = 60.0
    prior: float = 0.01

    def __post_init__(self) -> None:
        for name in ("capacity", "width", "neighbours"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"memory.{name}: {getattr(self, name)} remembers nothing: use at least 1"
                )
        for name in ("sharpness", "prior"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(
                    f"memory.{name}: {getattr(self, name)} is no weight: use a positive number"
                )


class Recall:
    """The memory of one sequence: committed positions by the state that the draft was in.

    With k_i the draft's state before position i, less the mean state, normed, and p_i what the
    target said there (softmax at temperature 1), a row in state k says

        q'(x) proportional to  prior q(x) + sum_i exp(sharpness (k . k_i - 1)) p_i(x)

    over its nearest neighbours i among *earlier* positions. q' is what drafts are drawn from, so
    that every acceptance rule applies as it is.

    Args:
        memory: the settings.
        columns: int64 token id of each logit column (None: the column itself).
        vocab_size: ids of the target; those without a column are not remembered.
    """

    def __init__(self, memory: Memory, columns: torch.Tensor | None, vocab_size: int) -> None:
        self.capacity, self._memory = memory.capacity, memory
        self._column_of: torch.Tensor | None = None
        if columns is not None:
            self._column_of = columns.new_full((vocab_size,), -1)
            self._column_of[columns] = torch.arange(len(columns), device=columns.device)
        self._count = 0  # positions ever remembered
        # of positions that lack the other half
        self._states: dict[int, torch.Tensor] = {}
        self._said: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def hear(self, logits: torch.Tensor, first: int) -> None:
        """Learn what the target said at committed positions from ``first`` on.

        Args:
            logits: `[positions, vocab]` of its verification, before any warping.
            first: absolute position of the token that the first row predicted.
        """
        logits, ids = logits.float().topk(min(self._memory.width, logits.shape[1]))
        probs = logits.softmax(-1)
        if self._column_of is not None:
            ids = self._column_of[ids]
            probs, ids = probs * (ids >= 0), ids.clamp(min=0)
        self._said.update({first + i: row for i, row in enumerate(zip(ids, probs, strict=True))})
        self._meet()
        self._states.clear()  # what is left was rejected
        for position in list(self._said)[: -self.capacity]:
            del self._said[position]  # the draft was never asked there

    @torch.inference_mode()
    def see(self, states: torch.Tensor, first: int) -> None:
        """The draft was in ``states`` `[positions, hidden]` before positions from ``first`` on."""
        self._states |= {first + i: state for i, state in enumerate(states.float())}
        self._meet()

    @torch.inference_mode()
    def recall(self, rows: Rows, first: int) -> Rows:
        """``rows``, with logits of q'.

        Args:
            rows: of the draft, for consecutive positions.
            first: absolute position of the token that the first row predicts.
        """
        states = rows.hidden.float()
        self.see(states, first)
        size = min(self._count, self.capacity)
        if not size:
            return rows
        here = torch.arange(first, first + len(states), device=states.device)
        likeness = normalize(states - self._mean, dim=-1) @ self._keys[:size].T
        likeness.masked_fill_(self._positions[:size] >= here[:, None], -torch.inf)
        likeness, nearest = likeness.topk(min(self._memory.neighbours, size))
        weight = (self._memory.sharpness * (likeness - 1)).exp()
        columns = self._columns[nearest].flatten(1)
        shares = (weight[..., None] * self._probs[nearest]).flatten(1)
        said = rows.logits.float().log_softmax(-1)
        # only the columns that a neighbour names change: log(q + share / prior), unnormalised
        shares = torch.zeros_like(said).scatter_add_(1, columns, shares).gather(1, columns)
        raised = torch.logaddexp(said.gather(1, columns), shares.log() - log(self._memory.prior))
        return rows._replace(logits=said.scatter(1, columns, raised))

    def _meet(self) -> None:
        """Remember the positions of which both halves are known."""
        known = [position for position in self._said if position in self._states]
        if not known:
            return
        halves = [(self._states.pop(position), *self._said.pop(position)) for position in known]
        known = known[-self.capacity :]
        states, columns, probs = map(torch.stack, zip(*halves[-len(known) :], strict=True))
        if not self._count:
            self._mean = torch.zeros_like(states[0])  # of all states so far
            self._keys = states.new_zeros(self.capacity, states.shape[1])
            self._probs = probs.new_zeros(self.capacity, probs.shape[1])
            self._columns = columns.new_zeros(self.capacity, columns.shape[1])
            self._positions = columns.new_zeros(self.capacity)
        slots = torch.arange(self._count, self._count + len(known)) % self.capacity
        self._count += len(known)
        self._mean += (states - self._mean).sum(0) / self._count
        self._keys[slots] = normalize(states - self._mean, dim=-1)
        self._columns[slots] = columns
        self._probs[slots] = probs
        self._positions[slots] = torch.tensor(known, device=states.device)
