"""Mirrors of metrics.jsonl; a tracker that fails says so once and is left out."""

import logging
from typing import Any, Protocol

from tts.errors import UserError

log = logging.getLogger(__name__)
MODES = ("disabled", "offline", "online")


class Tracker(Protocol):
    """Gets what metrics.jsonl gets."""

    def log(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """Nothing is kept."""

    def log(self, values: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Wandb:
    """Weights & Biases with its own axis ``tokens``; offline unless asked."""

    def __init__(self, mode: str, name: str, folder: str, config: dict[str, Any]) -> None:
        import wandb  # imported only when asked for

        self._run = wandb.init(
            project="test-time-speculation", mode=mode, name=name, dir=folder, config=config
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def log(self, values: dict[str, Any]) -> None:
        self._run.log(values)

    def close(self) -> None:
        self._run.finish()


class Safe:
    """Any tracker, whose failures cannot stop a run."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def log(self, values: dict[str, Any]) -> None:
        self._try(lambda: self._tracker.log(values))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            log.warning("tracker left out from here on: %s", error)
            self._tracker = NoTracker()


def make_tracker(mode: str, name: str, folder: str, config: dict[str, Any]) -> Tracker:
    """A tracker for ``mode``: disabled, offline or online.

    Raises:
        UserError: for another mode.
    """
    if mode not in MODES:
        raise UserError(f"wandb: {mode!r} is not one of {', '.join(MODES)}")
    if mode == "disabled":
        return NoTracker()
    try:
        return Safe(Wandb(mode, name, folder, config))
    except Exception as error:
        log.warning("wandb could not start, the run goes on without it: %s", error)
        return NoTracker()
