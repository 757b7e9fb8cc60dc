"""Tables for people."""

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from experiments.curves import (
    Curve,
    Rounds,
    acceptance_curve,
    by_third,
    interval,
    overlap_curve,
)
from tts.metrics import Summary, summarise

PER_ROUND = ("draft", "verify", "policy", "update")


def arms_table(arms: Mapping[str, Mapping[str, Rounds]], title: str) -> Table:
    """One column an arm; counts are pooled, thirds are means over conversations."""
    table = Table(title=title, title_justify="left", title_style="")
    table.add_column("")
    for arm in arms:
        table.add_column(arm, justify="right")
    pooled = [summarise(r for rounds in texts.values() for r in rounds) for texts in arms.values()]

    def row(name: str, value: Callable[[Summary], str]) -> None:
        table.add_row(name, *(value(summary) for summary in pooled))

    row("tokens", lambda s: str(s.num_emitted_tokens))
    row("tokens per second", lambda s: number(s.tok_s, 1))
    row("acceptance length (bonus counted)", lambda s: number(s.mean_acceptance_length, 3))
    row("draft acceptance rate", lambda s: number(s.draft_acceptance_rate, 3))
    row("overlap", lambda s: number(s.mean_overlap, 3))
    for name, curve, digits in (
        ("overlap by third", overlap_curve, 3),
        ("acceptance length by third", acceptance_curve, 2),
    ):
        table.add_row(
            name,
            *(" ".join(number(v, digits) for v in thirds(texts, curve)) for texts in arms.values()),
        )
    for part in PER_ROUND:
        row(f"{part} ms a round", lambda s, p=part: number(  # type: ignore[misc]
            getattr(s, f"{p}_ms") / s.num_spec_steps, 2))  # fmt: skip
    row("update share of time", lambda s: number(s.update_ms / s.total_ms, 3))
    row("updates (taken back)", lambda s: f"{s.num_updates} ({s.num_taken_back})")
    row("tokens with an adapted draft", lambda s: number(s.adapted_share, 2))
    row("path mismatches, per token", lambda s:
        f"{s.path_mismatches}, {number(s.path_mismatch_rate, 4)}")  # fmt: skip
    return table


def thirds(
    texts: Mapping[str, Rounds], curve: Callable[[Rounds, Sequence[int]], Curve]
) -> list[float]:
    """Mean over conversations of ``curve`` in each third of the output."""
    values = [by_third(rounds, curve) for rounds in texts.values()]
    return [interval(column)[0] for column in zip(*values, strict=True)]


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """A value and its interval, if it has one."""
    value, low, high = (number(x, digits) for x in values)
    return value if low == "-" else f"{value} [{low}, {high}]"


def number(value: float | None, digits: int) -> str:
    """Fixed digits, and a dash for what was not measured."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"
