"""SpecKV: the length with the most predicted tokens, whatever it costs (arXiv 2605.02888)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.plain import Plain
from tts.errors import UserError
from tts.policy import RoundOutcome, RoundState, Signals

GAMMAS = (2, 4, 6, 8)
HIDDEN = 16
CODE = {"none": 0.0, "int8": 1.0, "nf4": 2.0}  # of the target's weights
FEATURES = (
    "mean_draft_entropy", "mean_draft_confidence", "max_draft_entropy", "min_draft_confidence",
    "compression", "gamma",
)  # fmt: skip

Array = NDArray[np.float64]


class Regressor(NamedTuple):
    """One hidden layer of 16 rectified units; predicts accepted / drafted."""

    hidden: Array  # [features, HIDDEN]
    hidden_bias: Array  # [HIDDEN]
    output: Array  # [HIDDEN]
    output_bias: Array  # []
    typical: Array  # [4] mean signals of the records: what is assumed before anything was drafted

    def rate(self, features: Array) -> Array:
        """Predicted acceptance rate in [0, 1] of each row of ``features`` `[rows, features]`."""
        hidden = np.maximum(features @ self.hidden + self.hidden_bias, 0.0)
        return np.clip(hidden @ self.output + self.output_bias, 0.0, 1.0)

    def save(self, file: Path) -> None:
        """Write as JSON."""
        weights = {name: value.tolist() for name, value in self._asdict().items()}
        file.write_text(json.dumps({"features": FEATURES, "weights": weights}))

    @classmethod
    def load(cls, file: Path) -> "Regressor":
        """Raise UserError for a file that `tts fit` did not write."""
        try:
            saved = json.loads(file.read_text())
            if tuple(saved["features"]) != FEATURES:
                raise ValueError("other features")
            return cls(**{name: np.array(value) for name, value in saved["weights"].items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"weights: {file} holds no SpecKV regressor ({error}): write it with `tts fit`"
            ) from None


class SpecKv(Plain):
    """Draft argmax over gamma in {2, 4, 6, 8} of rate(signals, gamma) * gamma + 1 tokens.

    The published records hold signals of the very step whose length is chosen; a decoder only knows
    those of the step before, and that is what the regressor was fitted on here. Costs do not enter.

    Args:
        regressor: from `tts fit`.
        cap: largest gamma it plans.
        compression: of the target, a name of ``CODE``.
    """

    def __init__(self, regressor: Regressor, cap: int = 8, compression: str = "none") -> None:
        super().__init__(cap)
        self._regressor, self._code = regressor, CODE[compression]
        self.reset()

    def plan(self, state: RoundState) -> int:
        limit = min(self.cap, state.limit)
        gammas = np.array([gamma for gamma in GAMMAS if gamma <= limit])
        if not len(gammas):
            return limit
        rows = np.column_stack(
            [np.tile([*self._signals, self._code], (len(gammas), 1)), gammas.astype(float)]
        )
        return int(gammas[(self._regressor.rate(rows) * gammas).argmax()])

    def observe(self, outcome: RoundOutcome) -> None:
        if outcome.num_drafted:
            self._signals = np.array(step_signals(outcome.signals))

    def reset(self) -> None:
        self._signals = self._regressor.typical

    def state_dict(self) -> dict[str, Any]:
        return {"signals": self._signals.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._signals = np.array(state["signals"], dtype=np.float64)


def step_signals(signals: Sequence[Signals]) -> tuple[float, float, float, float]:
    """Mean entropy in bits, mean confidence, largest entropy, smallest confidence of a draft."""
    entropy = np.array([s.entropy for s in signals]) / np.log(2)
    confidence = np.array([s.confidence for s in signals])
    return (
        float(entropy.mean()), float(confidence.mean()),
        float(entropy.max()), float(confidence.min()),
    )  # fmt: skip
