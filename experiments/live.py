"""One line on the terminal that says how a generation is going; silent where nobody watches."""

import sys
import time
from collections.abc import Sequence

from tts.metrics import mean_acceptance_length, tokens_per_second
from tts.records import RoundRecord

RECENT = 32  # rounds
EVERY = 0.2  # seconds


class Live:
    """Tokens, tokens per second, acceptance length and gamma of the last rounds.

    Args:
        title: what is being decoded.
        total: tokens to come.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._shown = 0.0
        self._update = ""
        self._watched = sys.stderr.isatty()

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._watched:
            print(file=sys.stderr)

    def show(self, rounds: Sequence[RoundRecord]) -> None:
        """Called after every round with all rounds so far."""
        if (update := rounds[-1].update) is not None:
            gain = "" if update.smoothed_gain is None else f" gain {update.smoothed_gain:+.3f}"
            event = "" if update.event is None else f" {update.event}"
            self._update = f"  update {update.adapter_version}: loss {update.loss:.2f}{gain}{event}"
        if not self._watched or time.monotonic() - self._shown < EVERY:
            return
        self._shown = time.monotonic()
        recent = rounds[-RECENT:]
        tokens = rounds[-1].position + rounds[-1].num_emitted
        gamma = sum(r.num_drafted for r in recent) / len(recent)
        line = (
            f"{self._title}: {tokens}/{self._total} tokens  "
            f"{tokens_per_second(recent) or 0:.1f} tok/s  "
            f"acceptance {mean_acceptance_length(recent) or 1:.2f}  gamma {gamma:.1f}{self._update}"
        )
        print(f"\r{line:<120}", end="", file=sys.stderr, flush=True)
