"""What the target said the last times the draft was in a like state, mixed into what it says now.

A cache of the text itself, as in neural caches (Grave, Joulin, Usunier 2017) and kNN-LM (Khandelwal
et al. 2020), with two differences: a value is not the token that came but the target's whole
distribution, which every verification computes, and likeness decides how much it counts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tts.cached_model import Rows
from tts.errors import UserError

Numbers = NDArray[np.float32]


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
        self._column_of: NDArray[np.int64] | None = None
        if columns is not None:
            self._column_of = np.full(vocab_size, -1)
            self._column_of[columns.cpu().numpy()] = np.arange(len(columns))
        self._count = 0  # positions ever remembered
        # of positions that lack the other half
        self._states: dict[int, Numbers] = {}
        self._said: dict[int, tuple[NDArray[np.int64], Numbers]] = {}

    @torch.inference_mode()
    def hear(self, logits: torch.Tensor, first: int) -> None:
        """Learn what the target said at committed positions from ``first`` on.

        Args:
            logits: `[positions, vocab]` of its verification, before any warping.
            first: absolute position of the token that the first row predicted.
        """
        best, ids = (_host(x) for x in logits.topk(min(self._memory.width, logits.shape[1])))
        probs = np.exp(best - best[:, :1])
        probs /= probs.sum(1, keepdims=True)
        if self._column_of is not None:
            ids = self._column_of[ids]
            probs, ids = probs * (ids >= 0), ids.clip(min=0)
        self._said.update({first + i: row for i, row in enumerate(zip(ids, probs, strict=True))})
        self._meet()
        self._states.clear()  # what is left was rejected
        for position in list(self._said)[: -self.capacity]:
            del self._said[position]  # the draft was never asked there

    def see(self, states: torch.Tensor, first: int) -> None:
        """The draft was in ``states`` `[positions, hidden]` before positions from ``first`` on."""
        self._take(_host(states), first)

    @torch.inference_mode()
    def recall(self, rows: Rows, first: int) -> Rows:
        """``rows``, with logits of q'.

        Args:
            rows: of the draft, for consecutive positions.
            first: absolute position of the token that the first row predicts.
        """
        states = _host(rows.hidden)
        self._take(states, first)
        size = min(self._count, self.capacity)
        if not size:
            return rows
        # torch's product: after numpy's, its threads go on spinning and slow the target's pass
        state, keys = map(torch.from_numpy, (_normed(states - self._mean), self._keys[:size]))
        likeness = (state @ keys.T).numpy()
        here = np.arange(first, first + len(states))
        likeness[self._positions[:size] >= here[:, None]] = -np.inf
        count = min(self._memory.neighbours, size)
        nearest = likeness.argpartition(size - count)[:, size - count :]
        likeness = np.take_along_axis(likeness, nearest, 1)
        weight = np.exp(self._memory.sharpness * (likeness - 1))
        columns = self._columns[nearest].reshape(len(states), -1)
        shares = (weight[..., None] * self._probs[nearest]).reshape(columns.shape)
        width = rows.logits.shape[1]  # a target of more ids may name some that the draft lacks
        shares, columns = shares * (columns < width), columns.clip(max=width - 1)
        # what several neighbours say of a column counts together
        shares = np.stack([np.bincount(c, s)[c] for c, s in zip(columns, shares, strict=True)])
        said = rows.logits.float()
        # only the columns that a neighbour names change: log(q + share / prior), unnormalised
        with np.errstate(divide="ignore"):
            extra = np.log(shares / self._memory.prior).astype(np.float32)
        mass = said.logsumexp(-1, keepdim=True)
        named = torch.from_numpy(columns).to(said.device)
        raised = torch.from_numpy(extra).to(said.device) + mass
        raised = torch.logaddexp(said.gather(1, named), raised)
        return rows._replace(logits=said.scatter(1, named, raised))

    def _take(self, states: Numbers, first: int) -> None:
        self._states |= {first + i: state for i, state in enumerate(states)}
        self._meet()

    def _meet(self) -> None:
        """Remember the positions of which both halves are known."""
        known = [position for position in self._said if position in self._states]
        if not known:
            return
        halves = [(self._states.pop(position), *self._said.pop(position)) for position in known]
        known = known[-self.capacity :]
        states, columns, probs = map(np.stack, zip(*halves[-len(known) :], strict=True))
        if not self._count:
            self._mean = np.zeros_like(states[0])  # of all states so far
            self._keys = np.zeros((self.capacity, states.shape[1]), np.float32)
            self._probs = np.zeros((self.capacity, probs.shape[1]), np.float32)
            self._columns = np.zeros((self.capacity, columns.shape[1]), np.int64)
            self._positions = np.zeros(self.capacity, np.int64)
        slots = np.arange(self._count, self._count + len(known)) % self.capacity
        self._count += len(known)
        self._mean += (states - self._mean).sum(0) / self._count
        self._keys[slots] = _normed(states - self._mean)
        self._columns[slots] = columns
        self._probs[slots] = probs
        self._positions[slots] = known


def _host(x: torch.Tensor) -> NDArray[Any]:
    return (x.float() if x.is_floating_point() else x).detach().cpu().numpy()


def _normed(rows: Numbers) -> Numbers:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
