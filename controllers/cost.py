"""What a round costs on this machine, learned from the round's own timings.

cost = CostModel()
cost.observe(drafted=4, draft_ms=16.0, verify_ms=38.0)
cost.passes(8) - 1  # what eight drafted tokens cost, in rounds of gamma = 0
"""

import math
from collections.abc import Sequence
from operator import mul
from typing import Any

import numpy as np

# of a pass at gamma = 0: its milliseconds (logarithm), extra where anything is drafted, each row;
# and as shares of it: extra where a model drafts, each token that it drafts
PASS, PASS_SD = (math.log(35.0), 0.02, 0.02), (2.0, 0.1, 0.05)
DRAFT, DRAFT_SD = (0.05, 0.12), (0.3, 0.25)
# what one round's times are off by, and how far things move between rounds: the machine's speed
# (a logarithm again) comes and goes, what costs are to each other hardly changes
PASS_NOISE, SPEED_DRIFT, ROW_DRIFT = 0.1, 0.07, 0.0005
DRAFT_NOISE, DRAFT_DRIFT = 0.2, 0.001
WARM, WARM_NOISE = 6, 5.0  # first drafts, any of which may be slow (compilation): times the noise
OUTLIER = 2.0  # a later one counts as at most this many times what was foretold, or as that part
FLOOR = 0.01  # a drafted token costs at least this share of a pass


class CostModel:
    """Cost of a round in passes: 1 at gamma = 0, ``1 + extra + gamma * step`` above.

    A busy machine slows whole rounds, by half within a few of them. So only ratios are kept, from
    two Kalman filters. One compares a draft with the pass that verifies it, moments later. What a
    row adds to a pass is only told by passes of several rounds, among which the other follows the
    machine's speed. Copied drafts cost nothing but rows. Plain floats: a call takes microseconds.
    """

    def __init__(self) -> None:
        self._pass, self._draft = _Filter(PASS, PASS_SD), _Filter(DRAFT, DRAFT_SD)
        self._count = 0

    def observe(self, drafted: int, draft_ms: float, verify_ms: float, copied: int = 0) -> None:
        """Learn from a round of ``drafted`` tokens, ``copied`` of them by no model."""
        if verify_ms <= 0:  # a pass that took no time teaches nothing
            return
        log_ms, extra, row = self._pass.mean
        rows = max(1.0 + (drafted > 0) * extra + drafted * row, 0.5)
        error = math.log(verify_ms / rows) - log_ms
        # a great surprise is the machine's, and of all rounds
        drift = (max(SPEED_DRIFT, abs(error) / 2), ROW_DRIFT, ROW_DRIFT)
        self._pass.update((1.0, (drafted > 0) / rows, drafted / rows), error, PASS_NOISE, drift)
        made = drafted - copied
        if not made:
            return
        slopes, share = (1.0, float(made)), draft_ms * rows / verify_ms
        foretold = sum(map(mul, self._draft.mean, slopes))
        likely = max(foretold, FLOOR)
        if self._count < WARM:
            noise = WARM_NOISE * max(likely, share)
        else:
            share, noise = max(likely / OUTLIER, min(share, likely * OUTLIER)), likely
        self._count += 1
        noise *= DRAFT_NOISE
        self._draft.update(slopes, share - foretold, noise, (DRAFT_DRIFT, DRAFT_DRIFT))

    def passes(self, gamma: int, copied: int = 0) -> float:
        """Expected cost of a round with ``gamma`` drafted tokens; drafting is never free."""
        if gamma == 0:
            return 1.0
        # less than nothing where two rows take no longer than one, and three do
        extra = self._pass.mean[1] + (self._draft.mean[0] if gamma > copied else 0.0)
        return 1.0 + max(extra + (gamma - copied) * self.step + copied * self.copy, FLOOR)

    @property
    def pass_ms(self) -> float:
        """Milliseconds of a round at gamma = 0, at the machine's latest speed."""
        return math.exp(self._pass.mean[0])

    @property
    def step(self) -> float:
        """Marginal cost of one more token that a model drafts, its row in the pass included."""
        return max(self._draft.mean[1] + self._pass.mean[2], FLOOR)

    @property
    def copy(self) -> float:
        """Marginal cost of one more copied token: its row in the pass."""
        return max(self._pass.mean[2], FLOOR)

    def state_dict(self) -> dict[str, Any]:
        """Arrays and numbers that `load_state_dict` needs to go on."""
        parts = {"pass": self._pass, "draft": self._draft}
        means = {f"{name}_mean": np.array(part.mean) for name, part in parts.items()}
        covariances = {f"{name}_covariance": np.array(p.covariance) for name, p in parts.items()}
        return {**means, **covariances, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        for name, part in {"pass": self._pass, "draft": self._draft}.items():
            part.mean = [float(m) for m in state[f"{name}_mean"]]
            part.covariance = [[float(c) for c in row] for row in state[f"{name}_covariance"]]
        self._count = int(state["count"])


class _Filter:
    """Kalman's, for a few numbers that drift and are seen through one noisy sum of them."""

    def __init__(self, mean: Sequence[float], sd: Sequence[float]) -> None:
        self.mean = list(mean)
        self.covariance = [[x * x * (i == j) for j in range(len(sd))] for i, x in enumerate(sd)]

    def update(
        self, slopes: Sequence[float], error: float, noise: float, drift: Sequence[float]
    ) -> None:
        """Take in a sum with these ``slopes`` that was foretold wrong by ``error``.

        ``noise`` of the sum and ``drift`` of each number since the last one: standard deviations.
        """
        for i, sd in enumerate(drift):
            self.covariance[i][i] += sd * sd
        shared = [sum(map(mul, row, slopes)) for row in self.covariance]
        variance = sum(map(mul, shared, slopes)) + noise * noise
        gain = [s / variance for s in shared]
        self.covariance = [
            [c - g * s for c, s in zip(row, shared, strict=True)]
            for row, g in zip(self.covariance, gain, strict=True)
        ]
        self.mean = [m + g * error for m, g in zip(self.mean, gain, strict=True)]
