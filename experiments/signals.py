"""What the draft's signals are worth, and which gamma was best, from step records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from experiments.steps import Step

SIGNALS = (
    "mean_draft_entropy", "mean_draft_confidence", "max_draft_entropy", "min_draft_confidence",
)  # fmt: skip
TOKEN_SIGNALS = ("entropy", "confidence", "probability")
PUBLISHED = (-0.558, 0.570, -0.624, 0.619)  # pooled, computed from SpecKV's own records

Array = NDArray[np.float64]


def signal_summary(steps: Sequence[Step]) -> dict[str, Any]:
    """Counts, correlations with acceptance, and the best gamma by tokens and by time.

    "step before": the signal of the step before, all that is known when a length is chosen.
    """
    compressions = list(dict.fromkeys(step.compression for step in steps))
    rate = np.array([step.acceptance_rate for step in steps])
    prompts = np.array([step.prompt for step in steps])
    values = {name: np.array([getattr(step, name) for step in steps]) for name in SIGNALS}
    values["acceptance_rate"] = rate
    earlier = _earlier(steps)
    known = earlier >= 0
    here = {name: np.array([s.compression == name for s in steps]) for name in compressions}
    correlation = {
        name: {
            **{c: _pearson(values[name][rows], rate[rows]) for c, rows in here.items()},
            "pooled": _pearson(values[name], rate),
            "step before": _pearson(values[name][earlier[known]], rate[known]),
        }
        for name in values
    }
    for name in TOKEN_SIGNALS:
        by = {c: _of_tokens([s for s in steps if s.compression == c], name) for c in compressions}
        correlation[f"{name} of each token"] = by | {
            "pooled": _of_tokens(steps, name),
            "step before": None,
        }
    return {
        "steps": len(steps),
        "by_cell": {
            f"{c}/{task}": sum(s.compression == c and s.task == task for s in steps)
            for c in compressions
            for task in dict.fromkeys(s.task for s in steps)
        },
        "prompts": len(set(prompts)),
        "effective_n": effective_n(rate, prompts),
        "correlation": correlation,
        "gamma": {
            c: best_gamma([s for s in steps if s.compression == c]) for c in compressions
        },
    }  # fmt: skip


def best_gamma(steps: Sequence[Step]) -> dict[str, Any]:
    """Tokens a step and tokens a second of every gamma up to the cap, and the best ones."""
    accepted = np.array([step.accepted for step in steps])
    tokens = [float(np.minimum(accepted, g).mean() + 1) for g in range(steps[0].gamma + 1)]
    ms = [float(x) for x in np.mean([step.round_ms for step in steps], 0)]
    tok_s = [1000 * t / m for t, m in zip(tokens, ms, strict=True)]
    return {
        "tokens_per_step": tokens,
        "round_ms": ms,
        "tok_s": tok_s,
        "best_by_tokens": int(np.argmax(tokens)),
        "best_by_time": int(np.argmax(tok_s)),
    }


def effective_n(values: Array, prompts: NDArray[np.str_]) -> float:
    """Independent observations that ``values`` are worth, rows of one prompt being alike.

    n / (1 + (m - 1) rho), m the mean rows a prompt and rho the intraclass correlation of the
    one-way analysis of variance, taken as at least 0.
    """
    groups = [values[prompts == prompt] for prompt in np.unique(prompts)]
    n, k = len(values), len(groups)
    if k < 2 or n == k:
        return float(k)
    sizes = np.array([len(group) for group in groups])
    means = np.array([group.mean() for group in groups])
    between = float((sizes * (means - values.mean()) ** 2).sum() / (k - 1))
    within = sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / (n - k)
    size = (n - (sizes**2).sum() / n) / (k - 1)
    total = between + (size - 1) * within
    rho = max(0.0, (between - within) / total) if total > 0 else 0.0
    return float(n / (1 + (n / k - 1) * rho))


def _earlier(steps: Sequence[Step]) -> NDArray[np.int64]:
    """Row of the step before each, of the same prompt; -1 for the first."""
    rows = np.arange(len(steps)) - 1
    rows[[step.step == 0 for step in steps]] = -1
    return rows


def _of_tokens(steps: Sequence[Step], name: str) -> float | None:
    """Correlation of a token's signal with the probability that it is accepted, on the path."""
    pairs = [pair for s in steps for pair in zip(getattr(s, name), s.acceptance, strict=False)]
    return _pearson(*np.array(pairs).T)


def _pearson(x: Array, y: Array) -> float | None:
    constant = len(x) < 2 or x.std() == 0 or y.std() == 0
    return None if constant else float(np.corrcoef(x, y)[0, 1])


def show_signals(summary: dict[str, Any]) -> None:
    """Two tables: signals against acceptance, and gammas."""
    console = Console(width=120)
    columns = list(next(iter(summary["correlation"].values())))
    table = Table(
        title=f"correlation with accepted / drafted: {summary['steps']} steps of "
        f"{summary['prompts']} prompts, worth {summary['effective_n']:.0f} independent ones"
    )
    table.add_column("signal")
    for column in (*columns, "published, pooled"):
        table.add_column(column, justify="right")
    published = dict(zip(SIGNALS, PUBLISHED, strict=True))
    for name, values in summary["correlation"].items():
        cells = [_signed(value) for value in values.values()]
        table.add_row(name, *cells, _signed(published.get(name)))
    console.print(table)
    for compression, found in summary["gamma"].items():
        best = f"{found['best_by_tokens']} by tokens a step, {found['best_by_time']} by time"
        table = Table(title=f"{compression}: best gamma {best}")
        table.add_column("gamma")
        for gamma in range(len(found["tok_s"])):
            table.add_column(str(gamma), justify="right")
        for name in ("tokens_per_step", "round_ms", "tok_s"):
            table.add_row(name, *(f"{value:.2f}" for value in found[name]))
        console.print(table)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
