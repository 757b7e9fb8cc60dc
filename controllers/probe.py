"""When to draft where gamma 0 is thought best: without drafts there is nothing to learn from."""

from typing import Any

import numpy as np

COMMON, RARE, VAIN = 36, 160, 14  # rounds between probes; doubled after 14 in vain
SHARE = 0.01  # of the time, where nothing else is drafted
SLOWEST = 4.0  # rounds of gamma 0 that a round of a probe counts as at most


class Probe:
    """Rounds that draft against the odds: rare, at random times, within a share of the time.

    Args:
        rng: of the times; no period of the text shall hide.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._vain = 0.0  # probes that confirmed gamma = 0
        self._cost = 0.0  # passes that a round of a probe has lately taken more than gamma 0
        self._wait = self._interval()
        self.on = self._again = False  # this round is a probe; the next one shall be, too

    def reset(self) -> None:
        """A new sequence begins."""
        self.on = self._again = False

    def due(self) -> bool:
        """Whether this round, else one of gamma 0, is a probe; asked once a round."""
        self._wait -= 1
        self.on = self._again or self._wait <= 0
        if self.on:
            self._wait = self._interval()
        return self.on

    def took(self, passes: float) -> None:
        """What the probe cost, in rounds of gamma 0."""
        self._cost += (min(passes, SLOWEST) - 1 - self._cost) / 4

    def judge(self, gain: float, behind: bool) -> None:
        """Learn from a drafted round whether drafting pays.

        Args:
            gain: tokens that it won, less its cost.
            behind: what it cost is yet to be seen, since the draft first read what it had missed.
        """
        self._again = self.on and (behind or gain > 0)  # look twice before settling at 0
        if self.on and behind:
            return
        confirmed = self.on and not self._again
        self._vain = self._vain + 1 if confirmed else self._vain / 2

    def _interval(self) -> float:
        rounds = min(COMMON * (1 + self._vain / VAIN), RARE)
        affordable = 2 * self._cost / SHARE  # it is two rounds
        return max(rounds, affordable) * self._rng.uniform(0.5, 1.5)

    def state_dict(self) -> dict[str, Any]:
        """Numbers that `load_state_dict` needs to go on."""
        return {
            "vain": self._vain, "cost": self._cost, "wait": self._wait, "on": self.on,
            "again": self._again,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._vain, self._cost, self._wait = (float(state[n]) for n in ("vain", "cost", "wait"))
        self.on, self._again = bool(state["on"]), bool(state["again"])
