"""A small network that learns, while decoding, how far it pays to draft.

policy = make_policy("mlp", cap=8, seed=0)

It predicts a hazard per offset: the probability that a token is accepted given that all before it
were. A round that is rejected early says nothing about later offsets, and a hazard needs no such
labels. What to do with the prediction follows from measured costs alone (`CostModel`): with the
best rate lambda (tokens per ms), one more token pays while

    P(all drafted so far are accepted) * P(the next one is) >= lambda * (its cost in ms).

Before the first token the gain of drafting at all is weighed in the same way. Where that says no,
a rare probe drafts nevertheless: without drafts there would be nothing to learn from.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.cost import CostModel
from tts.errors import UserError
from tts.policy import RoundOutcome, RoundState, Signals

FEATURES = (
    "offset", "entropy", "confidence", "probability", "carried",
    "fast", "slow", "last_accepted", "position", "compression",
)  # fmt: skip
COMPRESSION = {"none": 0.0, "int8": 0.5, "nf4": 1.0}  # of the target's weights

HIDDEN = 16
SHAPES = ((len(FEATURES), HIDDEN), (HIDDEN,), (HIDDEN, 2), (2,))
PRIOR = 0.4  # acceptance expected before anything was seen
BLANK = (2.0, 0.5, 0.5, PRIOR, PRIOR, PRIOR)  # a history of nothing
FAST, SLOW = 1 / 8, 1 / 64  # per label, for the two averages of recent acceptance
RATE, OPTION = 1 / 32, 1 / 64  # per round, for realised tokens per ms and gain of drafting
LOOK = 1 / 32  # chance to draft one token more than pays
PROBE, RARE_PROBE, PATIENCE = 36, 160, 14  # rounds between probes; doubled after 14 in vain
SLOWEST = 4.0  # rounds of gamma 0 that a round of a probe counts as at most
REST = 4  # of so many rounds at gamma 0 one is timed: what passes wait for slows them fivefold
PROBE_SHARE = 0.01  # of the time, where nothing else is drafted
REPLAY, BATCH = 512, 56
EVERY = 8  # new rows between two lessons: numpy's many small calls after each round add up
STEP_SIZE, FIT_SIZE = 0.002, 0.01  # of Adam, while decoding and offline
# small steps forget least, but follow a change of regime slowly: where the mean error of the newest
# predictions (share a label) is beyond the alarm, the output's bias moves by so much of it a label
NEWEST, ALARM, SHIFT = 1 / 16, 0.12, 0.3

Array = NDArray[np.float64]
Round = tuple[RoundState, list[Signals], list[float], int]  # state, signals, labels, num_accepted


class Examples(NamedTuple):
    """One row for each time a token was drafted, or could have been."""

    features: Array  # [rows, len(FEATURES)]
    labels: Array  # [rows, 2]: acceptance of the newest token and of the next one; nan: unknown


NOTHING = Examples(np.empty((0, len(FEATURES))), np.empty((0, 2)))


class History:
    """What the features remember of one sequence."""

    def __init__(self, compression: float = 0.0) -> None:
        self.compression = compression
        self.reset()

    def reset(self) -> None:
        # entropy, confidence, probability of the last verified draft; fast, slow, last_accepted
        self.values = list(BLANK)

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

    def follow(self, drafted: Round) -> Examples:
        """Examples of a verified round; afterwards its outcome belongs to the past.

        Copies are left out: they follow what the model has drafted, and know how good they are.
        """
        state, signals, labels, num_accepted = drafted
        signals = [s for s in signals if not s.copied]
        labels = labels[: len(signals)]
        known = len(labels)
        if not known:
            return NOTHING
        rows = [self.row(state, newest) for newest in (None, *signals[:known])]
        targets = np.full((known + 1, 2), np.nan)
        targets[1:, 0] = targets[:-1, 1] = labels
        fast, slow = self.values[3:5]
        for label in labels:
            fast += FAST * (label - fast)
            slow += SLOW * (label - slow)
        self.values = [*signals[known - 1][1:4], fast, slow, min(1.0, num_accepted / len(signals))]
        return Examples(np.array(rows), targets)


def examples(rounds: Iterable[Round], compression: float = 0.0) -> Examples:
    """What `Mlp.observe` would have learned from, for the logged ``rounds`` of one sequence."""
    history = History(compression)
    parts = [NOTHING, *(history.follow(drafted) for drafted in rounds)]
    return Examples(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def split(weights: Array) -> list[Array]:
    """Views of a flat vector: hidden weights and biases, output weights and biases."""
    ends = np.cumsum([math.prod(shape) for shape in SHAPES])
    parts = np.split(weights, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


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


class Mlp:
    """Drafts while the next token is expected to pay for itself.

    Args:
        cap: largest gamma it plans.
        learning: False freezes the weights; costs and recent acceptance are followed all the same.
        seed: of the initial weights, the probes and the replay: equal inputs give equal choices.
        compression: of the target, a value of ``COMPRESSION``.
    """

    def __init__(
        self, *, cap: int = 8, learning: bool = True, seed: int = 0, compression: float = 0.0
    ) -> None:
        self.cap, self.learning = cap, learning
        self.cost, self._history = CostModel(), History(compression)
        self._rng = np.random.default_rng(seed)
        self.weights = np.zeros(sum(math.prod(shape) for shape in SHAPES))
        self._parts = split(self.weights)  # views: only ever write into the weights
        self._parts[0][:] = self._rng.normal(0, len(FEATURES) ** -0.5, SHAPES[0])
        self._parts[0][FEATURES.index("compression")] = 0.0  # until it was seen to matter
        self._parts[2][:] = self._rng.normal(0, 0.05, SHAPES[2])
        self._parts[3][:] = math.log(PRIOR / (1 - PRIOR))
        self._moments = np.zeros((2, len(self.weights)))
        self._replay = Examples(np.zeros((REPLAY, len(FEATURES))), np.zeros((REPLAY, 2)))
        self._steps = self._seen = 0  # optimiser steps, rows ever put into the replay
        self._tokens = self._ms = 0.0  # recent rounds, decayed
        self._off = 0.0  # mean error of the newest predictions
        self._confirmed = 0.0  # probes that confirmed gamma = 0
        self._probe_ms = 0.0  # that a round of a probe has lately taken longer than one of gamma 0
        self._wait = self._interval()
        self._probing = self._again = False  # this round is a probe; the next one shall be, too
        self._behind = False  # the draft has not read the newest tokens
        self._resting = False  # it chose gamma 0 and has learned nothing since
        self._rested = 0  # rounds of that
        self._survival = 1.0  # that all tokens drafted in this round are accepted
        self._expected = 0.0  # gain in tokens over not drafting, at a constant hazard
        self._option = 0.0  # what was gained beyond that: a draft can stop when it turns out hard

    @classmethod
    def load(
        cls,
        file: Path,
        *,
        cap: int = 8,
        learning: bool = True,
        seed: int = 0,
        compression: float = 0.0,
    ) -> "Mlp":
        """The policy with the weights in ``file``.

        Raises:
            UserError: for a file that `save` did not write.
        """
        policy = cls(cap=cap, learning=learning, seed=seed, compression=compression)
        try:
            saved = json.loads(file.read_text())
            if tuple(saved["features"]) != FEATURES:
                raise ValueError("other features")
            policy.weights[:] = saved["weights"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"weights: {file} holds no gamma MLP ({error}): write it with `tts fit`"
            ) from None
        return policy

    def save(self, path: Path) -> None:
        """Write the weights as JSON."""
        path.write_text(json.dumps({"features": FEATURES, "weights": self.weights.tolist()}))

    def train(self, data: Examples, epochs: int = 20) -> float:
        """Fit the weights offline to some ``data``; returns the last epoch's mean loss, nats."""
        assert len(data.features) > 0 < epochs
        for _ in range(epochs):
            order = self._rng.permutation(len(data.features))
            parts = np.array_split(order, max(1, len(order) // 64))
            losses = [
                self._step(Examples(*(column[p] for column in data)), FIT_SIZE) for p in parts
            ]
        self._moments[:], self._steps = 0.0, 0
        return sum(losses) / len(losses)

    def plan(self, state: RoundState) -> int:
        limit = min(self.cap, state.limit)
        self._survival, self._probing = 1.0, False
        if limit < 1:
            return 0
        if state.at_hand is not None:
            return limit if self._gain(state.at_hand, limit, copied=True) > 0 else 0
        if not self._resting:
            _, following = self._predict(state, None)
            self._expected = self._gain(following, limit)
            if self._expected + max(self._option, 0.0) > 0:
                return limit
            self._resting = True
        self._wait -= 1
        self._probing = self._again or self._wait <= 0
        if self._probing:
            self._wait = self._interval()
        return limit if self._probing else 0

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        # a copy says itself how good it is
        own, following = signals.confidence, 0.0
        if not signals.copied:
            own, following = self._predict(state, signals)
        self._survival *= own
        if signals.following is not None:
            return self._survival * signals.following >= self.rate * self.cost.copy_ms
        pays = self._survival * following >= self.rate * self.cost.step_ms
        # offsets that are always given up would never be seen again
        return pays or bool(self._rng.random() < LOOK)

    def observe(self, outcome: RoundOutcome) -> None:
        drafted = outcome.num_drafted
        if drafted == 0 and self._resting:
            self._behind, self._rested = True, self._rested + 1
            if self._rested % REST:
                return
        self._resting = False
        copied = sum(s.copied for s in outcome.signals)
        # after rounds without drafts the draft first reads what it missed: not what a draft costs
        behind, self._behind = self._behind and drafted > copied, drafted == 0
        if self._probing:
            alone, taken = self.cost.round_ms(0), outcome.draft_ms + outcome.verify_ms
            self._probe_ms += (min(taken, SLOWEST * alone) - alone - self._probe_ms) / 4
        if not behind:
            self.cost.observe(drafted, outcome.draft_ms, outcome.verify_ms, copied)
        # modelled time, so that an outlier moves neither this rate nor its comparison with others
        if not self._ms:
            self._tokens, self._ms = 1.0, self.cost.round_ms(0)
        self._tokens += RATE * (outcome.num_accepted + 1 - self._tokens)
        ms = self.cost.round_ms(drafted, copied)
        self._ms += RATE * (ms - self._ms)
        labels = outcome.acceptance() if drafted > copied else []
        if not labels:
            return
        fresh = self._history.follow((outcome.state, outcome.signals, labels, outcome.num_accepted))
        self._judge(labels, ms - self.cost.round_ms(0), behind)
        if self.learning:
            self._learn(fresh)

    def reset(self) -> None:
        self._history.reset()
        self._survival, self._resting = 1.0, False
        self._probing, self._again, self._behind = False, False, False

    @property
    def rate(self) -> float:
        """Lambda: the best rate known to be achievable here, tokens per ms."""
        alone = 1 / self.cost.round_ms(0)
        return max(alone, self._tokens / self._ms) if self._ms else alone

    def _predict(self, state: RoundState, newest: Signals | None) -> tuple[float, float]:
        w1, b1, w2, b2 = self._parts
        own, following = np.tanh(self._history.row(state, newest) @ w1 + b1) @ w2 + b2
        return 0.5 + 0.5 * math.tanh(own / 2), 0.5 + 0.5 * math.tanh(following / 2)

    def _interval(self) -> float:
        """Rounds at gamma = 0 until the next probe, random: no period of the text shall hide."""
        rounds = min(PROBE * (1 + self._confirmed / PATIENCE), RARE_PROBE)
        affordable = 2 * self._probe_ms / (PROBE_SHARE * self.cost.round_ms(0))  # it is two rounds
        return max(rounds, affordable) * self._rng.uniform(0.5, 1.5)

    def _judge(self, labels: list[float], extra_ms: float, behind: bool) -> None:
        """Learn from a drafted round, which took ``extra_ms``, whether drafting pays."""
        # on average the labels reached sum up to the tokens accepted, with less noise
        gain = sum(labels) - self.rate * extra_ms
        self._option += OPTION * (gain - self._expected - self._option)
        self._again = self._probing and (behind or gain > 0)  # look twice before settling at 0
        if self._probing and behind:  # its cost is yet to be seen
            return
        confirmed = self._probing and not self._again
        self._confirmed = self._confirmed + 1 if confirmed else self._confirmed / 2

    def _gain(self, hazard: float, limit: int, copied: bool = False) -> float:
        """Most tokens that drafting wins, less its cost, if each offset has this ``hazard``."""
        cost, rate = self.cost, self.rate
        spare, survival, tokens, best = cost.round_ms(0), 1.0, 0.0, -math.inf
        for gamma in range(1, limit + 1):
            survival *= hazard
            tokens += survival
            extra_ms = cost.round_ms(gamma, gamma if copied else 0) - spare
            best = max(best, tokens - rate * extra_ms)
        return best

    def _learn(self, fresh: Examples) -> None:
        wrong = fresh.labels[1:, 0] - hazards(self.weights, fresh.features[1:])[:, 0]
        self._off += NEWEST * float((wrong - self._off).sum())
        if abs(self._off) > ALARM:
            self._parts[3][:] += SHIFT * self._off * len(wrong)
        slots = (self._seen + np.arange(len(fresh.features))) % REPLAY
        for kept, new in zip(self._replay, fresh, strict=True):
            kept[slots] = new
        lessons = self._seen // EVERY
        self._seen += len(slots)
        if self._seen // EVERY == lessons:
            return
        newest = np.arange(self._seen - EVERY, self._seen) % REPLAY
        old = self._rng.integers(0, min(self._seen, REPLAY), BATCH)
        rows = np.concatenate([newest, old])
        self._step(Examples(*(column[rows] for column in self._replay)), STEP_SIZE)

    def _step(self, batch: Examples, size: float) -> float:
        """One step of Adam."""
        loss, gradient = loss_and_gradient(self.weights, batch)
        self._steps += 1
        first, second = self._moments
        first += 0.1 * (gradient - first)
        second += 0.01 * (gradient**2 - second)
        scale = size * math.sqrt(1 - 0.99**self._steps) / (1 - 0.9**self._steps)
        self.weights -= scale * first / (np.sqrt(second) + 1e-8)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Arrays, numbers and a string (the generator has words of 128 bits); no settings."""
        return {
            "weights": self.weights.copy(),
            "moments": self._moments.copy(),
            "features": self._replay.features.copy(),
            "labels": self._replay.labels.copy(),
            "history": np.array(self._history.values),
            "rng": json.dumps(self._rng.bit_generator.state),
            **{name: float(getattr(self, f"_{name}")) for name in NUMBERS},
            **{f"cost.{name}": value for name, value in self.cost.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights[:], self._moments[:] = state["weights"], state["moments"]
        self._replay.features[:], self._replay.labels[:] = state["features"], state["labels"]
        self._history.values = [float(value) for value in state["history"]]
        self._rng.bit_generator.state = json.loads(state["rng"])
        for name, kind in NUMBERS.items():
            setattr(self, f"_{name}", kind(state[name]))
        self.cost.load_state_dict({n: state[f"cost.{n}"] for n in self.cost.state_dict()})


NUMBERS = {
    "steps": int, "seen": int, "tokens": float, "ms": float, "confirmed": float, "wait": float,
    "probe_ms": float, "probing": bool, "again": bool, "behind": bool, "survival": float,
    "off": float, "expected": float, "option": float, "resting": bool, "rested": int,
}  # fmt: skip
