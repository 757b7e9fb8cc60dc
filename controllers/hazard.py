"""How likely the next drafted token is to be accepted: causal features and a small network.

A hazard per offset: the probability that a token is accepted given that all before it were. A round
that is rejected early says nothing about later offsets, and a hazard needs no such labels.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tts.policy import RoundState, Signals

FEATURES = (
    "offset", "entropy", "confidence", "probability", "carried",
    "fast", "slow", "last_accepted", "position", "compression",
)  # fmt: skip
COMPRESSION = {"none": 0.0, "int8": 0.5, "nf4": 1.0}  # of the target's weights

HIDDEN = 16
SHAPES = ((len(FEATURES), HIDDEN), (HIDDEN,), (HIDDEN, 2), (2,))
ENDS = tuple(accumulate(math.prod(shape) for shape in SHAPES))  # in a flat vector
PRIOR = 0.4  # acceptance expected before anything was seen
BLANK = (2.0, 0.5, 0.5, PRIOR, PRIOR, PRIOR)  # a history of nothing
FAST, SLOW = 1 / 8, 1 / 64  # per label, for the two averages of recent acceptance

Array = NDArray[np.float64]
Round = tuple[RoundState, list[Signals], list[float], int]  # state, signals, labels, num_accepted
Row = list[float]  # features, and two labels: acceptance of the newest token and of the next one


class Examples(NamedTuple):
    """One row for each time a token was drafted, or could have been."""

    features: Array  # [rows, len(FEATURES)]
    labels: Array  # [rows, 2]: acceptance of the newest token and of the next one; nan: unknown


def columns(rows: Array) -> Examples:
    """Features and labels of ``rows`` `[rows, len(FEATURES) + 2]`."""
    return Examples(rows[:, :-2], rows[:, -2:])


def made_by_model(signals: Sequence[Signals]) -> list[Signals]:
    """Those of a round's ``signals`` that are no copies, which come after them."""
    return [s for s in signals if not s.copied]


class History:
    """What the features remember of one sequence."""

    def __init__(self, compression: float = 0.0) -> None:
        self.compression = compression
        self.reset()

    def reset(self) -> None:
        # entropy, confidence, probability of the last verified draft; fast, slow, last_accepted
        self.values = list(BLANK)

    @property
    def usual(self) -> float:
        """Acceptance lately, of any token: between a noisy average and a late one."""
        return (self.values[3] + self.values[4]) / 2

    def row(self, state: RoundState, newest: Signals | None) -> list[float]:
        """Features `[len(FEATURES)]` once ``newest`` is drafted; None: before the first token."""
        entropy, confidence, probability, *recent = self.values
        offset, carried = 0, 1.0
        if newest is not None:
            offset, carried = newest.offset + 1, 0.0
            entropy, confidence, probability = newest[1:4]
        position = math.log1p(state.position) / 10
        said = [offset / 8, min(entropy, 12.0) / 4, confidence, probability, carried]
        return [*said, *recent, position, self.compression]

    def follow(self, drafted: Round) -> list[Row]:
        """Rows of a verified round of the model's own; afterwards its outcome belongs to the past.

        Labels beyond the signals are those of copies, which know themselves how good they are.
        """
        state, signals, labels, num_accepted = drafted
        labels = labels[: len(signals)]
        if not labels:
            return []
        said = [None, *signals[: len(labels)]]
        own, following = [math.nan, *labels], [*labels, math.nan]
        rows = [
            [*self.row(state, newest), a, b]
            for newest, a, b in zip(said, own, following, strict=True)
        ]
        self.pass_by(signals, labels, num_accepted)
        return rows

    def pass_by(self, signals: list[Signals], labels: list[float], num_accepted: int) -> None:
        """A verified round of ``signals`` of the model's own is the last one now."""
        entropy, confidence, probability = signals[min(num_accepted, len(signals) - 1)][1:4]
        fast, slow = self.values[3:5]
        for label in labels:
            fast += FAST * (label - fast)
            slow += SLOW * (label - slow)
        last = min(1.0, num_accepted / len(signals))
        self.values = [entropy, confidence, probability, fast, slow, last]


def examples(rounds: Iterable[Round], compression: float = 0.0) -> Examples:
    """What `Mlp.observe` would have learned from, for the logged ``rounds`` of one sequence."""
    history = History(compression)
    rows: list[Row] = []
    for state, signals, labels, num_accepted in rounds:
        rows += history.follow((state, made_by_model(signals), labels, num_accepted))
    return columns(np.array(rows).reshape(-1, len(FEATURES) + 2))


def split(weights: Array) -> list[Array]:
    """Views of a flat vector: hidden weights and biases, output weights and biases."""
    starts = (0, *ENDS)
    return [
        weights[start:end].reshape(shape)
        for start, end, shape in zip(starts, ENDS, SHAPES, strict=False)
    ]


def hazards(weights: Array, features: Array) -> Array:
    """Predicted acceptance of the newest token and of the next one, `[rows, 2]`."""
    w1, b1, w2, b2 = split(weights)
    z: Array = np.tanh(features @ w1 + b1) @ w2 + b2
    return 0.5 + 0.5 * np.tanh(z / 2)


def loss_and_gradient(weights: Array, batch: Examples) -> tuple[float, Array]:
    """Mean binary cross-entropy in nats over the known labels; its gradient `[weights]`."""
    w1, b1, w2, b2 = split(weights)
    x, y = batch
    hidden = np.tanh(x @ w1 + b1)  # [rows, HIDDEN]
    z = hidden @ w2 + b2  # [rows, 2]
    known = ~np.isnan(y)
    y, count = np.where(known, y, 0.0), known.sum()
    loss = float((known * (np.logaddexp(0, z) - y * z)).sum() / count)
    dz = known * (0.5 + 0.5 * np.tanh(z / 2) - y) / count
    dh = dz @ w2.T * (1 - hidden**2)
    parts = (x.T @ dh, dh.sum(0), hidden.T @ dz, dz.sum(0))
    return loss, np.concatenate([part.ravel() for part in parts])


class Network:
    """The hazards by 16 hidden units, and how they learn.

    Args:
        rng: for the initial weights.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.weights = np.zeros(ENDS[-1])
        w1, _, w2, b2 = split(self.weights)
        w1[:] = rng.normal(0, len(FEATURES) ** -0.5, SHAPES[0])
        w1[FEATURES.index("compression")] = 0.0  # until it was seen to matter
        w2[:] = rng.normal(0, 0.05, SHAPES[2])
        b2[:] = math.log(PRIOR / (1 - PRIOR))
        self.offset = 0.0  # of every prediction, in logits; not learned from rows
        self.forget()
        self._unfold()

    def predict(self, row: Sequence[float]) -> tuple[float, float]:
        """Acceptance of the newest token and of the next one, for one row of features.

        Plain floats, written out: after a pass of the target has gone through the caches, each call
        of numpy takes five times as long, and a loop over the features twice as long as their sum.
        """
        tanh = math.tanh
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9 = row
        own, following = self._bias[0] + self.offset, self._bias[1] + self.offset
        for w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, bias, to_own, to_following in self._units:
            # fmt: off
            unit = tanh(
                w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + w4 * x4
                + w5 * x5 + w6 * x6 + w7 * x7 + w8 * x8 + w9 * x9 + bias
            )
            # fmt: on
            own += to_own * unit
            following += to_following * unit
        return 0.5 + 0.5 * tanh(own / 2), 0.5 + 0.5 * tanh(following / 2)

    def write(self, weights: Any) -> None:
        """Take other weights, `[weights]`; raises ValueError for another number of them."""
        self.weights[:] = weights
        self._unfold()

    def step(self, batch: Examples, size: float) -> float:
        """One step of Adam; the loss before it."""
        loss, gradient = loss_and_gradient(self.weights, batch)
        self._steps += 1
        first, second = self._moments
        first += 0.1 * (gradient - first)
        second += 0.01 * (gradient**2 - second)
        scale = size * math.sqrt(1 - 0.99**self._steps) / (1 - 0.9**self._steps)
        self.weights -= scale * first / (np.sqrt(second) + 1e-8)
        self._unfold()
        return loss

    def forget(self) -> None:
        """Forget the steps that were taken, not what they taught."""
        self._moments, self._steps = np.zeros((2, len(self.weights))), 0

    def state_dict(self) -> dict[str, Any]:
        """Arrays and a number that `load_state_dict` needs to go on."""
        return {
            "weights": self.weights.copy(),
            "moments": self._moments.copy(),
            "steps": float(self._steps),
            "offset": self.offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.write(state["weights"])
        self._moments[:], self._steps = state["moments"], int(state["steps"])
        self.offset = float(state["offset"])

    def _unfold(self) -> None:
        """The weights unit by unit, as `predict` reads them."""
        w1, b1, w2, b2 = split(self.weights)
        self._units = np.column_stack((w1.T, b1, w2)).tolist()
        self._bias = b2.tolist()
