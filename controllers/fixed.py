"""The same gamma in every round; 0 is the target alone."""

from typing import Any

from tts.policy import RoundOutcome, RoundState, Signals


class Fixed:
    """Draft ``gamma`` tokens, always."""

    def __init__(self, gamma: int = 4) -> None:
        self.gamma = gamma

    def plan(self, state: RoundState) -> int:
        return min(self.gamma, state.limit)

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        return True

    def observe(self, outcome: RoundOutcome) -> None:
        pass

    def reset(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gamma = int(state["gamma"])
