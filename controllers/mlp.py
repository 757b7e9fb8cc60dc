"""A small network that learns, while decoding, how far it pays to draft.

policy = make_policy("mlp", cap=8, seed=0)

It predicts the acceptance of the next token (`controllers.hazard`). What to do with the prediction
follows from measured costs alone (`CostModel`): with the best rate lambda in tokens per pass (a
round at gamma = 0), one more token pays while

    P(all drafted so far are accepted) * P(the next one is) >= lambda * (its cost in passes).

Before the first token the gain of drafting at all is weighed in the same way: by what the last
draft said or, a round later, by what is usual. Where both say no, and drafting has lost some tokens
lately, it rests, and a rare probe drafts nevertheless (`controllers.probe`).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from controllers.cost import CostModel
from controllers.hazard import FEATURES, Examples, History, Network, Row, columns, made_by_model
from controllers.probe import Probe
from tts.errors import UserError
from tts.policy import RoundOutcome, RoundState, Signals

RATE, OPTION = 1 / 32, 1 / 64  # per round, for realised tokens per pass and gain of drafting
SURE = 1.2  # times the acceptance at which a first token pays: more than that is not questioned
PATIENCE = 8.0  # tokens that drafting may lose before it ends: only a rare probe ends a rest
LOOK = 1 / 128  # chance to draft one token more than pays
REST = 4  # of so many rounds at gamma 0 one is timed: what passes wait for slows them fivefold
REPLAY, BATCH = 2048, 56
# of so many drafted rounds one teaches, for that takes time; all of the first, and all while the
# newest predictions are off by so much
HEARD, FIRST, ALARM = 4, 32, 0.075
EVERY = 16  # new rows between two lessons: numpy's many small calls after each round add up
# of Adam, while decoding and offline: large steps wander about what is known already
STEP_SIZE, FIT_SIZE = 0.0015, 0.01
# steps of Adam forget little, but follow a change of regime slowly: meanwhile the mean error of the
# newest labels moves an offset of all predictions, in logits, which fades (shares a label)
NEWEST, SHIFT, FADE = 1 / 16, 1 / 8, 1 / 128


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
        self.network = Network(self._rng)
        self._fresh: list[Row] = []  # not yet in the replay
        self._replay = np.zeros((REPLAY, len(FEATURES) + 2))
        self._seen = 0  # rows ever put into the replay
        self._tokens = self._passes = 1.0  # of a recent round, decayed
        self._foretold: list[float] = []  # acceptance of the tokens drafted in this round
        self._off = 0.0  # mean error of the newest predictions
        self._probe = Probe(self._rng)
        self._look = int(self._rng.geometric(LOOK))  # tokens until one more is drafted than pays
        self._drafts = 0  # rounds in which the model drafted
        self._behind = False  # the draft has not read the newest tokens
        self._resting = False  # it chose gamma 0 and has learned nothing since
        self._rested = 0  # rounds of that
        self._lost = 0.0  # tokens that drafting has lost lately, at most `PATIENCE`
        self._survival = 1.0  # that all tokens drafted in this round are accepted
        self._foreseen = 0.0  # acceptance at every offset, as foreseen before the first token
        self._option = 0.0  # tokens won beyond that: a draft can stop when it turns out hard

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
            policy.network.write(saved["weights"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"weights: {file} holds no gamma MLP ({error}): write it with `tts fit`"
            ) from None
        return policy

    def save(self, path: Path) -> None:
        """Write the weights as JSON."""
        path.write_text(
            json.dumps({"features": FEATURES, "weights": self.network.weights.tolist()})
        )

    def train(self, data: Examples, epochs: int = 20) -> float:
        """Fit the weights offline to some ``data``; returns the last epoch's mean loss, nats."""
        assert len(data.features) > 0 < epochs
        for _ in range(epochs):
            order = self._rng.permutation(len(data.features))
            parts = np.array_split(order, max(1, len(order) // 64))
            losses = [
                self.network.step(Examples(*(column[p] for column in data)), FIT_SIZE)
                for p in parts
            ]
        self.network.forget()
        return sum(losses) / len(losses)

    def plan(self, state: RoundState) -> int:
        limit = min(self.cap, state.limit)
        self._survival, self._probe.on, self._foretold = 1.0, False, []
        if limit < 1:
            return 0
        if state.at_hand is not None:
            return limit if self._gain(state.at_hand, limit, copied=True) > 0 else 0
        if not self._resting:
            # what the last draft said tells little of the next one: it is asked where that may
            # decide, and is of the past once a round has gone by without a draft
            self._foreseen = self._history.usual
            if self._foreseen >= SURE * self.rate * (self.cost.passes(1) - 1):
                return limit
            if not self._behind:
                _, self._foreseen = self.network.predict(self._history.row(state, None))
            if self._gain(self._foreseen, limit) + max(self._option, 0.0) > 0:
                return limit
            if self._behind and self._lost < PATIENCE:  # a no is of the moment until it is dear
                return limit
            self._resting = True
        return limit if self._probe.due() else 0

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        # a copy says itself how good it is
        own, following = signals.confidence, 0.0
        if not signals.copied:
            own, following = self.network.predict(self._history.row(state, signals))
            self._foretold.append(own)
        self._survival *= own
        if signals.following is not None:
            return self._survival * signals.following >= self.rate * self.cost.copy
        pays = self._survival * following >= self.rate * self.cost.step
        self._look -= 1
        if self._look > 0:
            return pays
        # offsets that are always given up would never be seen again
        self._look = int(self._rng.geometric(LOOK))
        return True

    def observe(self, outcome: RoundOutcome) -> None:
        drafted = outcome.num_drafted
        if drafted == 0 and self._resting:
            self._resting, self._behind = self._behind, True
            self._rested += 1
            if self._rested % REST:
                return
        self._resting = False
        own = made_by_model(outcome.signals)
        copied = drafted - len(own)
        # after rounds without drafts the draft first reads what it missed: not what a draft costs
        behind, self._behind = self._behind and len(own) > 0, drafted == 0
        if self._probe.on:
            self._probe.took((outcome.draft_ms + outcome.verify_ms) / self.cost.pass_ms)
        self._drafts += len(own) > 0
        heard = not own or self._probe.on or self._teaches()
        if heard and not behind:
            self.cost.observe(drafted, outcome.draft_ms, outcome.verify_ms, copied)
        # modelled cost, so that an outlier moves neither this rate nor its comparison with others
        self._tokens += RATE * (outcome.num_accepted + 1 - self._tokens)
        passes = self.cost.passes(drafted, copied)
        self._passes += RATE * (passes - self._passes)
        if not own:
            return
        accepted = outcome.num_accepted
        cost = self.rate * (passes - 1)  # in tokens
        if not self._probe.on:
            self._lost = min(max(self._lost + cost - accepted, 0.0), PATIENCE)
        if heard:
            labels = outcome.acceptance()
            fresh = self._history.follow((outcome.state, own, labels, accepted))
            # on average the labels reached sum up to the tokens accepted, with less noise
            gain = sum(labels) - cost
            foreseen = self._gain(self._foreseen, min(self.cap, outcome.state.limit))
            self._option += OPTION * (gain - foreseen - self._option)
            self._probe.judge(gain, behind)
            if self.learning:
                self._learn(fresh)
        else:  # what came of it says less than how likely that was, and costs nothing
            labels = [1.0] * accepted + [0.0]
            self._history.pass_by(own, labels[: len(own)], accepted)
        if self.learning:
            self._watch(labels)

    def reset(self) -> None:
        self._history.reset()
        self._survival, self._resting = 1.0, False
        self._behind, self._lost = False, 0.0
        self._probe.reset()

    @property
    def rate(self) -> float:
        """Lambda: the best rate known to be achievable here, tokens per pass."""
        return max(1.0, self._tokens / self._passes)

    def _teaches(self) -> bool:
        """Whether to hear what the newest drafted round has to say."""
        return self._drafts <= FIRST or self._drafts % HEARD == 0 or abs(self._off) > ALARM

    def _gain(self, hazard: float, limit: int, copied: bool = False) -> float:
        """Most tokens that drafting wins, less its cost, if each offset has this ``hazard``."""
        rate, survival, tokens, best = self.rate, 1.0, 0.0, -math.inf
        for gamma in range(1, limit + 1):
            survival *= hazard
            tokens += survival
            extra = self.cost.passes(gamma, gamma if copied else 0) - 1
            if best > (gain := tokens - rate * extra):
                break  # costs grow steadily, what a token adds falls
            best = gain
        return best

    def _learn(self, fresh: list[Row]) -> None:
        self._fresh += fresh
        if len(self._fresh) < EVERY:
            return
        slots = np.arange(self._seen, self._seen + len(self._fresh)) % len(self._replay)
        self._replay[slots], self._fresh = self._fresh, []
        self._seen += len(slots)
        old = self._rng.integers(0, min(self._seen, len(self._replay)), BATCH)
        self.network.step(columns(self._replay[np.concatenate([slots, old])]), STEP_SIZE)

    def _watch(self, labels: list[float]) -> None:
        """Expect more of every token, or less, where the newest predictions were too far off."""
        for label, foretold in zip(labels, self._foretold, strict=False):  # the last may be missing
            self._off += NEWEST * (label - foretold - self._off)
            self.network.offset += SHIFT * self._off - FADE * self.network.offset

    def state_dict(self) -> dict[str, Any]:
        """Arrays, numbers and a string (the generator has words of 128 bits); no settings."""
        return {
            **self.network.state_dict(),
            "replay": self._replay.copy(),
            "fresh": np.array(self._fresh),
            "history": np.array(self._history.values),
            "rng": json.dumps(self._rng.bit_generator.state),
            **{name: float(getattr(self, f"_{name}")) for name in NUMBERS},
            **{f"cost.{name}": value for name, value in self.cost.state_dict().items()},
            **{f"probe.{name}": value for name, value in self._probe.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state)
        # as long as it was: a state outlives the setting
        self._replay, self._fresh = np.array(state["replay"]), state["fresh"].tolist()
        self._history.values = [float(value) for value in state["history"]]
        self._rng.bit_generator.state = json.loads(state["rng"])
        for name, kind in NUMBERS.items():
            setattr(self, f"_{name}", kind(state[name]))
        self.cost.load_state_dict({n: state[f"cost.{n}"] for n in self.cost.state_dict()})
        self._probe.load_state_dict({n: state[f"probe.{n}"] for n in self._probe.state_dict()})


NUMBERS = {
    "seen": int, "tokens": float, "passes": float, "behind": bool, "survival": float,
    "off": float, "foreseen": float, "option": float, "resting": bool, "rested": int,
    "lost": float, "look": int, "drafts": int,
}  # fmt: skip
