"""`tts speckv`: SpecKV's published records under its own protocol and under an honest one.

The paper (arXiv 2605.02888) fits acceptance from signals of the very draft whose length is chosen,
scores the choice by its own predictions, and refits on the test rows before it does. Beside that
stands what the same records say when only the past is known, prompts are held out whole, outcomes
are measured ones, and time counts.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from experiments.options import readable
from tts.errors import UserError

GAMMAS = (2, 4, 6, 8)
COMPRESSIONS = ("fp16", "int8", "nf4")
SIGNALS = (
    "mean_draft_entropy", "mean_draft_confidence", "max_draft_entropy", "min_draft_confidence",
)  # fmt: skip
STEPS, RUNS = "phase2_step_results.csv", "phase2_experiment_results.csv"
SEED, FOLDS, RESAMPLES = 42, 5, 10_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SpecKv:
    """Read SpecKV's records as the paper does, and causally.

    Args:
        records: folder with the authors' phase2_step_results.csv and phase2_experiment_results.csv.
    """

    records: str = ""


@dataclass(frozen=True)
class Records:
    """One row a speculation step, in the order in which they were made."""

    compression: NDArray[np.int64]  # index into COMPRESSIONS
    gamma: Array
    task: NDArray[np.str_]
    prompt: NDArray[np.int64]  # 0..19; the same text in every compression and gamma
    first: NDArray[np.bool_]  # a run begins: nothing came before
    signals: Array  # [rows, len(SIGNALS)]
    rate: Array  # accepted / drafted
    tokens: Array  # emitted, correction or bonus counted

    def features(self, gamma: float | Array, causal: bool) -> Array:
        """`[rows, features]` with this ``gamma``; ``causal``: signals of the step before."""
        signals = self.signals
        if causal:
            signals = np.column_stack([signals, self.rate])
            signals = np.roll(signals, 1, axis=0)
            signals[self.first] = signals[~self.first].mean(0)  # nothing is known yet
        length = np.broadcast_to(gamma, self.gamma.shape)
        return np.column_stack([signals, self.compression, length])


def speckv(config: SpecKv) -> dict[str, Any]:
    """Compute, print the table, return the JSON summary."""
    if not config.records:
        raise UserError("records: give the folder of SpecKV's csv files")
    folder = Path(config.records).expanduser()
    steps = read_steps(_table(folder / STEPS))
    times = step_times(_table(folder / RUNS))
    try:
        published, honest = as_published(steps), as_measured(steps, times)
    except ImportError:
        raise UserError(
            "speckv: the paper's regressor needs scikit-learn: run pip install scikit-learn"
        ) from None
    summary = {"published": published, "honest": honest, "cost": times}
    _show(summary)
    return summary


def as_published(steps: Records) -> dict[str, float]:
    """The paper's phase 4: split by row, signals of the same step, predictions as outcomes."""
    from sklearn.model_selection import train_test_split

    strata = np.char.add(steps.compression.astype(str), steps.task)
    train, test = train_test_split(
        np.arange(len(steps.rate)), test_size=0.2, random_state=SEED, stratify=strata
    )
    x = steps.features(steps.gamma, causal=False)
    predicted = regressor(x[train], steps.rate[train]).predict(x[test])
    model = regressor(x, steps.rate)  # the refit on all rows, test rows included
    expected = _expected(model, steps, causal=False)[test]  # [rows, gammas]
    chosen = expected.max(1)
    return {
        "correlation": float(np.corrcoef(predicted, steps.rate[test])[0, 1]),
        "fixed_4": float(expected[:, 1].mean()),
        "fixed_8": float(expected[:, 3].mean()),
        "speckv": float(chosen.mean()),
        "gain": float(chosen.mean() / expected[:, 1].mean() - 1),
        "picks_8": float((expected.argmax(1) == 3).mean()),
        "p": _bootstrap_p(chosen - expected[:, 1]),  # never above: a maximum is not below its parts
        "decision_ms": _decision_ms(model, steps),
    }


def as_measured(steps: Records, times: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Signals of the step before, prompts held out whole, tokens and seconds that were measured.

    A choice is scored where the logged step happened to have the chosen length; so is its rival.
    """
    cost = np.array([[times[c]["step_s"][str(g)] for g in GAMMAS] for c in COMPRESSIONS])
    guessed = np.empty(len(steps.rate))
    by_tokens = np.empty(len(steps.rate), dtype=np.int64)
    by_time = by_tokens.copy()
    x = steps.features(steps.gamma, causal=True)
    for fold in range(FOLDS):
        held = steps.prompt % FOLDS == fold  # every task in every fold
        model = regressor(x[~held], steps.rate[~held])
        guessed[held] = model.predict(x[held])
        expected = _expected(model, steps, causal=True)[held]
        by_tokens[held] = expected.argmax(1)
        by_time[held] = (expected / cost[steps.compression[held]]).argmax(1)
    real = np.searchsorted(GAMMAS, steps.gamma)
    seconds = cost[steps.compression, real]

    def of(rows: NDArray[np.bool_]) -> tuple[float, float]:
        return float(steps.tokens[rows].mean()), float(
            steps.tokens[rows].sum() / seconds[rows].sum()
        )

    fixed = {g: of(real == i) for i, g in enumerate(GAMMAS)}
    tokens, per_second = of(real == by_tokens)
    prompts = range(int(steps.prompt.max()) + 1)
    gains = np.array(
        [
            steps.tokens[(real == by_tokens) & (steps.prompt == p)].mean()
            - steps.tokens[(real == 3) & (steps.prompt == p)].mean()
            for p in prompts
        ]
    )
    best = np.array([GAMMAS.index(times[c]["fastest_gamma"]) for c in COMPRESSIONS])
    return {
        "correlation": float(np.corrcoef(guessed, steps.rate)[0, 1]),
        "fixed_4": fixed[4][0],
        "fixed_8": fixed[8][0],
        "speckv": tokens,
        "gain": tokens / fixed[4][0] - 1,
        "gain_over_8": tokens / fixed[8][0] - 1,
        "picks_8": float((by_tokens == 3).mean()),
        "p": _bootstrap_p(gains),  # of no gain over fixed 8
        "tokens_per_s_fixed_4": fixed[4][1],
        "tokens_per_s_fixed_8": fixed[8][1],
        "tokens_per_s_best_fixed": of(real == best[steps.compression])[1],
        "tokens_per_s_speckv": per_second,
        "tokens_per_s_by_time": of(real == by_time)[1],
    }


def read_steps(rows: list[dict[str, str]]) -> Records:
    """The authors' step records.

    Raises:
        UserError: a column that is missing, or a value that is not a finite number.
    """
    numeric = ("gamma", "step", "acceptance_rate", "tokens_produced", *SIGNALS)
    columns = {name: _numbers(rows, name, STEPS) for name in numeric}
    compression = [_known(row, "compression", COMPRESSIONS) for row in rows]
    if "task" not in rows[0]:
        raise UserError(f"records: {STEPS} has no column task: use the authors' file")
    task = np.array([row["task"] for row in rows])
    first = columns["step"] == 0
    # prompts of a task come in one order in every run; a run begins at step 0
    counts: dict[tuple[str, ...], int] = {}
    prompt = []
    tasks = sorted(set(task))
    for row, begins in zip(rows, first, strict=True):
        cell = (row["compression"], row["gamma"], row["task"])
        counts[cell] = counts.get(cell, -1) + bool(begins)
        prompt.append(counts[cell] * len(tasks) + tasks.index(row["task"]))
    return Records(
        np.array(compression), columns["gamma"], task, np.array(prompt), first,
        np.column_stack([columns[name] for name in SIGNALS]),
        columns["acceptance_rate"], columns["tokens_produced"],
    )  # fmt: skip


def step_times(rows: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """What a step costs by compression and gamma, from the authors' timings.

    ``elapsed = steps * (verify + draft * gamma)`` by least squares; ``c`` is draft / verify.
    """
    names = ("gamma", "elapsed_sec", "num_steps", "num_tokens")
    gamma, elapsed, steps, tokens = (_numbers(rows, name, RUNS) for name in names)
    compression = np.array([_known(row, "compression", COMPRESSIONS) for row in rows])
    made = {}
    for code, name in enumerate(COMPRESSIONS):
        here = compression == code
        design = np.column_stack([steps[here], steps[here] * gamma[here]])
        (verify, draft), *_ = np.linalg.lstsq(design, elapsed[here], rcond=None)
        speed = {str(g): float((tokens / elapsed)[here & (gamma == g)].mean()) for g in GAMMAS}
        made[name] = {
            "c": float(draft / verify),
            "step_s": {str(g): float(verify + draft * g) for g in GAMMAS},
            "tokens_per_s": speed,
            "fastest_gamma": int(max(speed, key=lambda g: speed[g])),
            "mean_step_ms": float(1000 * elapsed[here].sum() / steps[here].sum()),
        }
    return made


def regressor(x: Array, y: Array) -> Any:
    """The paper's: one hidden layer of 16, scikit-learn's defaults otherwise."""
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(hidden_layer_sizes=(16,), max_iter=500, random_state=SEED).fit(x, y)


def _expected(model: Any, steps: Records, causal: bool) -> Array:
    """Expected tokens of a step with each gamma `[rows, gammas]`."""
    rates = [model.predict(steps.features(float(g), causal)).clip(0, 1) for g in GAMMAS]
    return np.column_stack([rate * g + 1 for rate, g in zip(rates, GAMMAS, strict=True)])


def _decision_ms(model: Any, steps: Records) -> float:
    """Median time to score the four lengths of one step."""
    row = np.tile(steps.features(2.0, causal=False)[:1], (len(GAMMAS), 1))
    row[:, -1] = GAMMAS
    times = []
    for _ in range(200):
        began = time.perf_counter()
        model.predict(row).argmax()
        times.append(time.perf_counter() - began)
    return float(1000 * np.median(times))


def _bootstrap_p(differences: Array) -> float:
    """Share of resampled means that are not above zero; nan is not measured."""
    differences = differences[~np.isnan(differences)]
    random = np.random.default_rng(SEED)
    means = [random.choice(differences, len(differences)).mean() for _ in range(RESAMPLES)]
    return float((np.array(means) <= 0).mean())


def _show(summary: dict[str, Any]) -> None:
    published, honest, cost = summary["published"], summary["honest"], summary["cost"]
    table = Table(title="SpecKV on its own records")
    for column in ("", "the paper's protocol", "causal, prompts held out, measured"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        ("correlation with acceptance", "correlation", ".3f"),
        ("tokens a step, fixed 4", "fixed_4", ".3f"),
        ("tokens a step, fixed 8", "fixed_8", ".3f"),
        ("tokens a step, SpecKV", "speckv", ".3f"),
        ("SpecKV over fixed 4", "gain", "+.1%"),
        ("SpecKV over fixed 8", "gain_over_8", "+.1%"),
        ("SpecKV picks 8", "picks_8", ".1%"),
        ("bootstrap p", "p", ".3f"),
        ("tokens/s, fixed 4", "tokens_per_s_fixed_4", ".1f"),
        ("tokens/s, fixed 8", "tokens_per_s_fixed_8", ".1f"),
        ("tokens/s, best fixed by compression", "tokens_per_s_best_fixed", ".1f"),
        ("tokens/s, SpecKV", "tokens_per_s_speckv", ".1f"),
        ("tokens/s, SpecKV with costs", "tokens_per_s_by_time", ".1f"),
    ]  # fmt: skip
    for title, key, form in rows:
        cells = [
            format(column[key], form) if key in column else "" for column in (published, honest)
        ]
        table.add_row(title, *cells)
    console = Console(width=120)
    console.print(table)
    for name, of in cost.items():
        share = published["decision_ms"] / of["mean_step_ms"]
        console.print(
            f"{name}: fastest gamma {of['fastest_gamma']} by the authors' timings; a draft step is "
            f"{of['c']:.2f} of a verification, a decision {share:.2%} of a step"
        )


def _table(file: Path) -> list[dict[str, str]]:
    with readable(str(file), "records").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    if not rows:
        raise UserError(f"records: {file} is empty: copy the authors' file again")
    return rows


def _numbers(rows: list[dict[str, str]], name: str, file: str) -> Array:
    try:
        values = np.array([float(row[name]) for row in rows])
    except KeyError:
        raise UserError(f"records: {file} has no column {name}: use the authors' file") from None
    except (TypeError, ValueError):
        raise UserError(f"records: column {name} of {file} holds no number somewhere") from None
    if not np.isfinite(values).all():
        raise UserError(f"records: column {name} of {file} holds NaN: remove or mend such rows")
    return values


def _known(row: dict[str, str], name: str, values: tuple[str, ...]) -> int:
    if row.get(name) not in values:
        raise UserError(f"records: {name} {row.get(name)!r} is not one of {', '.join(values)}")
    return values.index(row[name])
