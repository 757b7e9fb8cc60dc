"""Hugging Face's schedule ``heuristic``: longer after success, shorter after failure."""

from typing import Any

from controllers.plain import Plain
from tts.policy import RoundOutcome, RoundState


class Heuristic(Plain):
    """gamma + 2 after a round that was accepted whole, else gamma - 1, at least 1.

    As transformers does it in `AssistedCandidateGenerator.update_candidate_strategy`, from its
    default of 20 tokens; its default threshold (`controllers.confidence`) is off, as for those who
    set it to 0. ``transient`` starts anew with every sequence (``heuristic_transient``).
    """

    def __init__(self, cap: int = 40, start: int = 20, transient: bool = False) -> None:
        super().__init__(cap)
        self._start, self._transient = min(start, cap), transient
        self.gamma = self._start

    def plan(self, state: RoundState) -> int:
        return min(self.gamma, state.limit)

    def observe(self, outcome: RoundOutcome) -> None:
        if outcome.num_drafted:
            whole = outcome.num_accepted == outcome.num_drafted
            self.gamma = min(self.gamma + 2, self.cap) if whole else max(1, self.gamma - 1)

    def reset(self) -> None:
        if self._transient:
            self.gamma = self._start

    def state_dict(self) -> dict[str, Any]:
        return {"gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gamma = int(state["gamma"])
