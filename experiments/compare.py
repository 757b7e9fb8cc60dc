"""`tts compare`: one table and one figure from several runs, every conversation shown."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.curves import (
    BIN,
    CURVES,
    Curve,
    Rounds,
    acceptance_curve,
    by_third,
    interval,
    length,
    overlap_curve,
    quotient,
    worst,
)
from experiments.options import readable, writable
from experiments.plots import position_figure
from experiments.report import arms_table, number, spread
from tts.errors import UserError
from tts.records import RoundRecord, UpdateRecord

Arms = dict[str, dict[str, list[RoundRecord]]]
QUANTITIES: dict[str, Callable[[Rounds, Sequence[int]], Curve]] = {
    "overlap": overlap_curve,
    "acceptance_length": acceptance_curve,
}


@dataclass(frozen=True)
class Compare:
    """Join results folders of `tts run` and compare their arms with the first one.

    Args:
        runs: results folders; a conversation that an earlier one has in the same arm is left out.
        caption: below the figure.
        out: figure to write ("": none).
        curves: its panels, of `experiments.curves.CURVES`.
        bin: tokens that a point of the figure stands for.
    """

    runs: tuple[str, ...] = ()
    caption: str = ""
    out: str = ""
    curves: tuple[str, ...] = tuple(QUANTITIES)
    bin: int = BIN

    def __post_init__(self) -> None:
        for name in self.curves:
            if name not in CURVES:
                raise UserError(f"curves: {name!r} is not one of {', '.join(CURVES)}")
        if not self.curves or self.bin < 1:
            raise UserError("curves, bin: the figure needs a panel, and bins of at least a token")


def compare(config: Compare) -> dict[str, Any]:
    """Print the tables, draw the figure, return the JSON summary."""
    if not config.runs:
        raise UserError("runs: none given: name results folders of `tts run`")
    out = writable(config.out, "out", new=False) if config.out else None
    arms = read(config.runs)
    console = Console(width=120)
    console.print(arms_table(arms, config.caption))
    summary = {name: _by_third(arms, curve) for name, curve in QUANTITIES.items()}
    for name, conversations in summary.items():
        console.print(_table(name, conversations, list(arms)))
    if out is not None:
        position_figure(arms, config.curves, out, config.caption, config.bin)
    return {"runs": list(config.runs), "relative_to": next(iter(arms))} | summary


def read(runs: Sequence[str]) -> Arms:
    """arm -> conversation -> rounds, only of conversations that every arm finished."""
    arms: Arms = {}
    for run in runs:
        here: Arms = {}
        for line in readable(str(Path(run) / "metrics.jsonl"), "runs").read_text().splitlines():
            row = json.loads(line)
            place = here.setdefault(row.pop("arm"), {}).setdefault(row.pop("conversation"), [])
            update = row.pop("update")
            fields = {name: row[name] for name in RoundRecord.__slots__ if name in row}
            place.append(RoundRecord(**fields, update=update and UpdateRecord(**update)))
        for arm, conversations in here.items():
            for name, rounds in conversations.items():
                arms.setdefault(arm, {}).setdefault(name, rounds)
    lengths = {
        name: {length(rounds) for rounds in found if rounds}
        for name in next(iter(arms.values()), {})
        if all(found := [conversations.get(name, []) for conversations in arms.values()])
    }
    whole = [name for name, ends in lengths.items() if len(ends) == 1]
    if not whole:
        raise UserError("runs: no conversation was finished by every arm: give more of them")
    return {arm: {name: texts[name] for name in sorted(whole)} for arm, texts in arms.items()}


def _by_third(
    arms: Mapping[str, Mapping[str, Rounds]], curve: Callable[[Rounds, Sequence[int]], Curve]
) -> dict[str, dict[str, list[float]]]:
    """conversation -> arm -> values of the three thirds and of the whole."""
    made: dict[str, dict[str, list[float]]] = {}
    for arm, conversations in arms.items():
        for name, rounds in conversations.items():
            values = by_third(rounds, curve) + curve(rounds, [0, length(rounds)]).value
            made.setdefault(name, {})[arm] = values
    return made


def _table(name: str, conversations: dict[str, dict[str, list[float]]], arms: list[str]) -> Table:
    base, *others = arms
    table = Table(title=f"{name} by third and overall; then relative to {base}")
    table.add_column("conversation")
    for arm in arms:
        table.add_column(arm, justify="right")
    for conversation, values in conversations.items():
        cells = [" ".join(number(v, 3) for v in values[arm]) for arm in arms]
        table.add_row(conversation, *cells)
    means = [
        " ".join(number(interval(column)[0], 3)
                 for column in zip(*(v[arm] for v in conversations.values()), strict=True))
        for arm in arms
    ]  # fmt: skip
    table.add_row("mean", *means, end_section=True)
    for part, label in ((2, "third 3"), (3, "overall")):
        cells = []
        for arm in others:
            ratios = [quotient(v[arm][part], v[base][part]) for v in conversations.values()]
            cells.append(f"{spread(interval(ratios))}, worst {number(worst(ratios), 3)}")
        table.add_row(f"{label} / {base}", "", *cells)
    return table
