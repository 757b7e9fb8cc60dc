"""`tts export`: what a policy did, as a table that a server can follow without the policy.

Cells are context length by recent acceptance; a cell holds the mean number of drafted tokens there,
rounded, and null where the run never came. Recent acceptance is accepted / drafted over the last
rounds that drafted, of the same conversation.
"""

import json
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.options import readable, writable
from tts.errors import UserError

RECENT = 8  # rounds that drafted
ACCEPTANCE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # lower edges


@dataclass(frozen=True)
class Export:
    """Write the lengths of one arm as a table.

    Args:
        run: results folder of `tts run` or `tts policies`.
        arm: whose lengths.
        compression: only rounds of this one ("": all).
        contexts: lower edges of the context bins, tokens.
        out: JSON file to write; it must not exist.
    """

    run: str = ""
    arm: str = "gamma"
    compression: str = ""
    contexts: tuple[int, ...] = (0, 256, 512, 1024, 2048, 4096)
    out: str = "gamma_table.json"

    def __post_init__(self) -> None:
        if not self.contexts or list(self.contexts) != sorted({0, *self.contexts}):
            raise UserError(f"contexts: {self.contexts} do not rise from 0: use 0, 256, 1024, ...")


def export(config: Export) -> dict[str, Any]:
    """Read the rounds, write the table, return it."""
    out = writable(config.out, "out")
    file = readable(str(Path(config.run) / "metrics.jsonl"), "run")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    arms = sorted({row["arm"] for row in rows})
    if config.arm not in arms:
        raise UserError(f"arm: {config.arm!r} is not in this run, it has {', '.join(arms)}")
    kept = [
        row
        for row in rows
        if row["arm"] == config.arm and config.compression in ("", row.get("compression"))
    ]
    if not kept:
        raise UserError(f"compression: the run has no round of {config.compression!r}")
    table = gamma_table(kept, config.contexts)
    out.write_text(json.dumps(table, indent=1) + "\n")
    return {"out": str(out), "arm": config.arm} | table


def gamma_table(rows: list[dict[str, Any]], contexts: tuple[int, ...]) -> dict[str, Any]:
    """``gamma[i][j]`` from context ``contexts[i]`` and acceptance ``ACCEPTANCE[j]`` on."""
    cells = [[[0, 0] for _ in ACCEPTANCE] for _ in contexts]  # rounds, drafted tokens
    recent: dict[tuple[Any, ...], deque[tuple[int, int]]] = {}
    for row in rows:
        text = row.get("compression"), row["conversation"]
        past = recent.setdefault(text, deque(maxlen=RECENT))
        if past:
            rate = sum(accepted for accepted, _ in past) / sum(drafted for _, drafted in past)
            line = cells[bisect_right(contexts, row["context_length"]) - 1]
            cell = line[bisect_right(ACCEPTANCE, rate) - 1]
            cell[0] += 1
            cell[1] += row["num_drafted"]
        if row["num_drafted"]:
            past.append((row["num_accepted"], row["num_drafted"]))
    return {
        "context_length": list(contexts),
        "recent_acceptance": list(ACCEPTANCE),
        "gamma": [[round(d / n) if n else None for n, d in line] for line in cells],
        "rounds": [[n for n, _ in line] for line in cells],
    }
