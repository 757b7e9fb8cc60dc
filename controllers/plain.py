"""What most published rules have in common: a cap, and nothing learned."""

from typing import Any

from tts.policy import RoundOutcome, RoundState, Signals


class Plain:
    """Draft up to ``cap`` tokens; subclasses say when to stop earlier."""

    def __init__(self, cap: int) -> None:
        self.cap = cap

    def plan(self, state: RoundState) -> int:
        return min(self.cap, state.limit)

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        return True

    def observe(self, outcome: RoundOutcome) -> None:
        pass

    def reset(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
