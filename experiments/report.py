"""Tables for people."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from experiments.curves import Rounds, acceptance_curve, interval, overlap_curve, third_edges
from tts.metrics import summarise


def arms_table(arms: Mapping[str, Mapping[str, Rounds]], title: str) -> Table:
    """One row an arm: counts pooled, thirds as means over conversations."""
    table = Table(title=title, title_justify="left")
    for column in (
        "arm", "tokens", "tok/s", "acceptance length", "rate", "overlap by third",
        "acceptance by third", "draft ms", "verify ms", "policy ms", "mismatches",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, conversations in arms.items():
        pooled = [r for rounds in conversations.values() for r in rounds]
        if not pooled:
            continue
        s = summarise(pooled)
        rounds = s.num_spec_steps
        table.add_row(
            arm,
            str(s.num_emitted_tokens),
            _number(s.tok_s, 1),
            _number(s.mean_acceptance_length, 3),
            _number(s.draft_acceptance_rate, 3),
            " ".join(_number(v, 3) for v in thirds(conversations, overlap_curve)),
            " ".join(_number(v, 2) for v in thirds(conversations, acceptance_curve)),
            _number(s.draft_ms / rounds, 1),
            _number(s.verify_ms / rounds, 1),
            _number(s.policy_ms / rounds, 2),
            str(s.path_mismatches),
        )
    return table


def thirds(conversations: Mapping[str, Rounds], curve) -> list[float]:  # type: ignore[no-untyped-def]
    """Mean over conversations of ``curve`` in each third of the output."""
    values = [curve(r, third_edges(r[-1].position + r[-1].num_emitted)).value
              for r in conversations.values() if r]  # fmt: skip
    return [interval(column)[0] for column in zip(*values, strict=True)]


def show(console: Console, table: Table) -> None:
    console.print(table)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
