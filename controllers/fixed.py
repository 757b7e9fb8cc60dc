"""The same gamma in every round; 0 is the target alone."""

from typing import Any

from controllers.plain import Plain


class Fixed(Plain):
    """Draft ``cap`` tokens, always."""

    def state_dict(self) -> dict[str, Any]:
        return {"gamma": self.cap}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cap = int(state["gamma"])
