"""SVIP: stop after a token of which the draft was unsure (arXiv 2411.18462)."""

import math

from controllers.plain import Plain
from tts.policy import RoundState, Signals


class Svip(Plain):
    """Draft on while sqrt(slope * H) <= threshold, H the draft's entropy in nats at temperature 1.

    By Pinsker acceptance is at least 1 - sqrt(KL(q || p) / 2); with the cross-entropy taken as a
    constant multiple of the entropy that is 1 - sqrt(slope * H). The defaults are the authors':
    stop above 0.60 nats, at most 40 tokens. Costs do not enter.
    """

    def __init__(self, cap: int = 40, slope: float = 0.15, threshold: float = 0.3) -> None:
        super().__init__(cap)
        self.slope, self.threshold = slope, threshold

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        return math.sqrt(self.slope * signals.entropy) <= self.threshold
