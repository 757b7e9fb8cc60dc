"""Hugging Face's default rule: stop after an unlikely token, the threshold fitted online."""

from typing import Any

import numpy as np

from controllers.plain import Plain
from tts.policy import RoundOutcome, RoundState, Signals

ENOUGH = 5  # more verified tokens than this before the first fit
MISS = 3.0  # what a needless stop costs, in needless drafts


class Confidence(Plain):
    """Draft on while the drafted token's own probability is at least the threshold.

    As transformers does it (`ConfidenceCriteria` and `update_candidate_strategy`): at most 20
    tokens, threshold .4; after each round the threshold that minimises FPR + 3 FNR over all
    verified tokens of the sequence, positives being the accepted ones. What was never drafted is
    never learned, and costs do not enter.
    """

    def __init__(self, cap: int = 20, threshold: float = 0.4) -> None:
        super().__init__(cap)
        self._first = threshold
        self.reset()

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        return _own(signals) >= self.threshold

    def observe(self, outcome: RoundOutcome) -> None:
        verified = outcome.signals[: outcome.num_accepted + 1]
        self._said += [_own(signals) for signals in verified]
        self._kept += [j < outcome.num_accepted for j in range(len(verified))]
        if len(self._said) > ENOUGH and 0 < sum(self._kept) < len(self._kept):
            self.threshold = best_threshold(np.array(self._said), np.array(self._kept))

    def reset(self) -> None:
        self.threshold = self._first
        self._said: list[float] = []  # of each verified token, its probability
        self._kept: list[bool] = []  # and whether it was accepted

    def state_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "said": np.array(self._said),
            "kept": np.array(self._kept, dtype=np.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold = float(state["threshold"])
        self._said = [float(x) for x in state["said"]]
        self._kept = [bool(x) for x in state["kept"]]


def best_threshold(said: np.ndarray, kept: np.ndarray) -> float:
    """The one of the values ``said`` (or infinity: accept none) that minimises FPR + 3 FNR.

    Args:
        said: probabilities `[n]`.
        kept: bool `[n]`, true for positives; both kinds occur.
    """
    order = np.argsort(-said, kind="stable")
    said, kept = said[order], kept[order]
    last = np.append(said[1:] != said[:-1], True)  # of each run of equal probabilities
    hits = np.cumsum(kept)[last] / kept.sum()
    alarms = np.cumsum(~kept)[last] / (~kept).sum()
    costs = np.append(MISS, alarms + MISS * (1 - hits))  # first: accept none
    best = int(costs.argmin())
    return float("inf") if best == 0 else float(said[last][best - 1])


def _own(signals: Signals) -> float:
    """Probability of the drafted token; where q is a point mass (temperature 0, or a nucleus of
    one token, where transformers says 1) it says nothing, and the softmax speaks."""
    return signals.probability if signals.probability < 1 else signals.confidence
