"""BanditSpec: the length as the arm of a bandit, tokens per second as its reward (2505.15141)."""

from typing import Any

import numpy as np

from controllers.plain import Plain
from tts.policy import RoundOutcome, RoundState

DELTA = 0.05  # the bonus holds with probability 1 - DELTA


class Bandit(Plain):
    """Play every gamma 0..cap once, then the one with the highest mean reward plus bonus.

    The paper's lengths end at 4. Bonus of an arm played n times in t rounds, K arms, rewards within
    a range L (UCBSpec):
    (L / 2) sqrt((1 + n) / n^2 * (1 + 2 log(K t^2 sqrt(1 + n) / DELTA))). The released code divides
    by the plays of all arms together, which makes it greedy on one noisy timing; here it is as in
    the paper. L is the largest reward seen, so that no unit enters. A round that the end of the
    text cut short teaches the arm that it was.
    """

    def __init__(self, cap: int = 8) -> None:
        super().__init__(cap)
        self._plays = np.zeros(cap + 1)
        self._sums = np.zeros(cap + 1)
        self._range = 0.0
        self._arm = 0  # of this round

    def plan(self, state: RoundState) -> int:
        arms = min(self.cap, state.limit) + 1
        plays = self._plays[:arms]
        if plays.all():
            self._arm = int((self._sums[:arms] / plays + self._bonus(plays)).argmax())
        else:
            self._arm = int(plays.argmin())
        return self._arm

    def observe(self, outcome: RoundOutcome) -> None:
        reward = (outcome.num_accepted + 1) / (outcome.draft_ms + outcome.verify_ms)
        self._plays[self._arm] += 1
        self._sums[self._arm] += reward
        self._range = max(self._range, reward)

    def _bonus(self, plays: np.ndarray) -> np.ndarray:
        rounds, arms = self._plays.sum(), len(self._plays)
        log = np.log(arms * rounds**2 * np.sqrt(1 + plays) / DELTA)
        return self._range / 2 * np.sqrt((1 + plays) / plays**2 * (1 + 2 * log))

    def state_dict(self) -> dict[str, Any]:
        return {"plays": self._plays.copy(), "sums": self._sums.copy(), "range": self._range}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plays[:], self._sums[:] = state["plays"], state["sums"]
        self._range = float(state["range"])
