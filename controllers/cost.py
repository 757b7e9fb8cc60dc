"""What a round costs on this machine, learned from the round's own timings.

cost = CostModel()
cost.observe(drafted=4, draft_ms=16.0, verify_ms=38.0)
cost.round_ms(8) - cost.round_ms(0)  # what eight drafted tokens cost over none
"""

from operator import mul
from typing import Any

import numpy as np

# gamma = 0; extra where a model drafts at all, each token that it drafts; extra where all drafts
# are copies, each copy (free until one was seen, else a fast machine would never see one)
PRIOR_MS = (35.0, 2.0, 4.0, 0.0, 0.0)
PRIOR_SD_MS = (100.0, 10.0, 8.0, 10.0, 4.0)
NOISE, FIRST_NOISE = 0.15, 0.5  # standard deviation of one round's time, as a fraction of it
DRIFT = (0.003, 0.001, 0.0005, 0.001, 0.0005)  # of each between rounds, as a fraction of a round
WARM = 6  # observations that no prediction can judge: any of them may be slow (compilation)
OUTLIER = 2.0  # a round counts as at most this many times its prediction
SPEED = 0.01  # drift of all of them together between rounds: that of the machine
FLOOR = 0.01  # a drafted token costs at least this fraction of a round


class CostModel:
    """Round time in ms: ``base`` at gamma = 0, ``base + extra + gamma * step`` above.

    Copied drafts only cost their rows in the verify pass, and so have an extra and a step of their
    own. A Kalman filter over these five: they drift slowly (the context grows), and the
    shared base lets rounds of any gamma tell of the others, so a gamma that is rarely used does
    not go stale. Other work on the machine only ever slows a round down: slow rounds are clipped,
    and fast ones weigh more. Most drift is the machine's, whose speed comes and goes: it moves all
    five by one factor, also those of rounds that are not seen. Plain floats: a call takes
    microseconds.
    """

    def __init__(self) -> None:
        self._mean = list(PRIOR_MS)
        self._covariance = [
            [sd * sd if i == j else 0.0 for j in range(len(PRIOR_MS))]
            for i, sd in enumerate(PRIOR_SD_MS)
        ]
        self._count = 0

    def observe(self, drafted: int, draft_ms: float, verify_ms: float, copied: int = 0) -> None:
        """Learn from a round of ``drafted`` tokens, ``copied`` of them by no model."""
        made = drafted - copied  # by a model
        x = (1.0, float(made > 0), float(made), float(made == 0 < copied), float(copied))
        predicted, measured = self.round_ms(drafted, copied), draft_ms + verify_ms
        scale, noise = min(predicted, measured), FIRST_NOISE * measured
        if self._count >= WARM:
            measured, noise = min(measured, OUTLIER * predicted), NOISE * scale
        self._count += 1
        drift = [(d * scale) ** 2 for d in DRIFT]
        foretold = sum(map(mul, self._mean, x))
        speed = [SPEED**2 * m for m in self._mean]
        # covariance with the round's time, once all have drifted
        shared = [
            sum(map(mul, row, x)) + s * foretold + d * y
            for row, s, d, y in zip(self._covariance, speed, drift, x, strict=True)
        ]
        variance = sum(map(mul, shared, x)) + noise**2
        if variance <= 0:  # a round that took no time teaches nothing
            return
        gain = [s / variance for s in shared]
        self._covariance = [
            [c + s * m - g * b for c, m, b in zip(row, self._mean, shared, strict=True)]
            for row, s, g in zip(self._covariance, speed, gain, strict=True)
        ]
        for i, d in enumerate(drift):
            self._covariance[i][i] += d
        error = measured - foretold
        self._mean = [m + g * error for m, g in zip(self._mean, gain, strict=True)]

    def round_ms(self, gamma: int, copied: int = 0) -> float:
        """Expected time of a round with ``gamma`` drafted tokens; drafting is never free."""
        base = max(self._mean[0], 1e-3)
        if gamma == 0:
            return base
        # less than nothing where two rows take no longer than one, and three do
        extra = self._mean[1 if gamma > copied else 3]
        tokens = (gamma - copied) * self.step_ms + copied * self.copy_ms
        return base + max(extra + tokens, FLOOR * base)

    @property
    def step_ms(self) -> float:
        """Marginal cost of one more token that a model drafts, its row in the pass included."""
        return max(self._mean[2], FLOOR * self._mean[0], 1e-6)

    @property
    def copy_ms(self) -> float:
        """Marginal cost of one more copied token: its row in the pass."""
        return max(self._mean[4], FLOOR * self._mean[0], 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """Arrays and numbers that `load_state_dict` needs to go on."""
        return {
            "mean": np.array(self._mean),
            "covariance": np.array(self._covariance),
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._mean = [float(m) for m in state["mean"]]
        self._covariance = [[float(c) for c in row] for row in state["covariance"]]
        self._count = int(state["count"])
