"""AdaEDL: an entropy bound on acceptance, its threshold adapted (arXiv 2410.18351)."""

import math
from typing import Any

from controllers.plain import Plain
from tts.policy import RoundOutcome, RoundState, Signals

ACCEPTANCE = 0.9  # aimed at
STEP, SMOOTHING, MEMORY = 0.01, 0.9, 0.5  # of the controller that the paper takes over


class AdaEdl(Plain):
    """Draft on while 1 - sqrt(slope * H) >= threshold, H in nats at temperature 1.

    After each round r <- .5 r + .5 accepted / drafted; the threshold moves a tenth of .01 up while
    r < .9, else down unless the cap was reached. That controller is Draft & Verify's; the
    paper's own first threshold is not published, .5 is that controller's for sampling.
    """

    def __init__(self, cap: int = 8, slope: float = 0.2, threshold: float = 0.5) -> None:
        super().__init__(cap)
        self.slope, self._first = slope, threshold
        self.threshold, self._rate = threshold, ACCEPTANCE

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        return 1 - math.sqrt(self.slope * signals.entropy) >= self.threshold

    def observe(self, outcome: RoundOutcome) -> None:
        if not outcome.num_drafted:
            return
        rate = outcome.num_accepted / outcome.num_drafted
        self._rate = MEMORY * self._rate + (1 - MEMORY) * rate
        step = STEP
        if self._rate >= ACCEPTANCE:
            step = -STEP if outcome.num_drafted < self.cap else 0.0
        self.threshold += (1 - SMOOTHING) * step

    def reset(self) -> None:
        self.threshold, self._rate = self._first, ACCEPTANCE

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "rate": self._rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold, self._rate = float(state["threshold"]), float(state["rate"])
