"""`tts fit`: what the learned policies start from, fitted on step records and judged on others.

Prompts are split, never rows: three fifths to fit on, a fifth to choose on (when to stop training,
which threshold), a fifth to report on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from controllers import make_policy
from controllers.hazard import COMPRESSION, Examples, examples, hazards, loss_and_gradient
from controllers.mlp import Mlp
from controllers.specdecpp import (
    AcceptanceHead,
    SpecDecPp,
    optimal_threshold,
    save_head,
    weighted_loss,
)
from controllers.speckv import CODE, GAMMAS, Regressor, step_signals
from experiments import replay
from experiments.curves import known
from experiments.options import writable
from experiments.replay import follow, reliability
from experiments.report import spread
from experiments.speckv import regressor
from experiments.steps import Step, read, read_hidden
from tts.errors import UserError

FIFTHS = 5
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
HEAD_RATE, HEAD_BATCH, HEAD_DECAY = 3e-4, 64, 0.1  # the paper's rate, 5e-5, is for 40,000 prompts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """Fit the gamma MLP, SpecKV's regressor and SpecDec++'s head to step records.

    Args:
        records: files of `tts profile --records`.
        epochs: passes over the examples at most.
        seed: of everything random.
        out: folder for the weights; it must not exist. Name it with --weights to use them.
    """

    records: tuple[str, ...] = ()
    epochs: int = 30
    seed: int = 0
    out: str = "weights"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"epochs: {self.epochs} fits nothing: use at least 1")


@dataclass(frozen=True)
class Data:
    """Steps in the order in which they were made, and the draft's states `[steps, cap, width]`."""

    steps: list[Step]
    hidden: torch.Tensor

    def of(self, kept: Sequence[bool]) -> "Data":
        """The steps that are marked."""
        chosen = [step for step, keep in zip(self.steps, kept, strict=True) if keep]
        return Data(chosen, self.hidden[torch.tensor(kept)])

    def runs(self) -> list[list[Step]]:
        """Steps of one text each, from its first on."""
        made: list[list[Step]] = []
        for step in self.steps:
            if step.step == 0:
                made.append([])
            made[-1].append(step)
        return made


def fit(config: Fit) -> dict[str, Any]:
    """Fit, write, report on prompts that nothing was fitted or chosen on."""
    if not config.records:
        raise UserError("records: give files of `tts profile --records`")
    out = writable(config.out, "out")
    data, draft = read_all(config.records)
    train, held, test = split(data)
    out.mkdir()
    mlp = fit_mlp(train, held, config)
    mlp.save(out / "mlp.json")
    fit_speckv(train, config.seed).save(out / "speckv.json")
    head = fit_head(train, held, config)
    by_cost = optimal_threshold(*_costs(train.steps))
    file = out / "specdecpp.safetensors"
    save_head(head, file, draft=draft, tuned=by_cost, by_cost=by_cost)
    tuned = tune(file, held)  # as it will be read, in bfloat16
    save_head(head, file, draft=draft, tuned=tuned, by_cost=by_cost)
    summary = {
        "out": str(out),
        "steps": {"fitted": len(train.steps), "chosen on": len(held.steps),
                  "reported on": len(test.steps)},
        "thresholds": {"tuned": tuned, "by_cost": by_cost},
        "predictions": predictions(out, test, config.seed),
        "tok_s": compare(out, test),
    }  # fmt: skip
    _show(summary)
    return summary


def read_all(files: Sequence[str]) -> tuple[Data, str]:
    """The steps of all ``files`` with their states, and the fingerprint of the draft.

    Raises:
        UserError: for a file that `read` or `read_hidden` refuses, or files of several drafts.
    """
    steps = [read(file) for file in files]
    hidden = [read_hidden(file, len(of)) for file, of in zip(files, steps, strict=True)]
    drafts = {draft for _, draft in hidden}
    if len(drafts) > 1:
        raise UserError(f"records: {', '.join(files)} are of several drafts: fit each alone")
    states = torch.cat([of for of, _ in hidden])
    return Data(list(chain.from_iterable(steps)), states), drafts.pop()


def split(data: Data) -> tuple[Data, Data, Data]:
    """To fit, to choose and to report on; every fifth prompt of each task, whole.

    Raises:
        UserError: for records of fewer than five prompts a task.
    """
    order: dict[str, list[str]] = {}
    for step in data.steps:
        prompts = order.setdefault(step.task, [])
        if step.prompt not in prompts:
            prompts.append(step.prompt)
    few = [task for task, prompts in order.items() if len(prompts) < FIFTHS]
    if few:
        raise UserError(
            f"records: {few[0]} has {len(order[few[0]])} prompts, a split needs {FIFTHS}: profile "
            "more"
        )
    fifth = [order[step.task].index(step.prompt) % FIFTHS for step in data.steps]
    return (
        data.of([f < FIFTHS - 2 for f in fifth]),
        data.of([f == FIFTHS - 2 for f in fifth]),
        data.of([f == FIFTHS - 1 for f in fifth]),
    )


def fit_mlp(train: Data, held: Data, config: Fit) -> Mlp:
    """The gamma MLP at the epoch that is best on ``held``."""
    data, other = mlp_examples(train), mlp_examples(held)
    mlp = Mlp(seed=config.seed)
    best, weights = np.inf, mlp.network.weights.copy()
    for _ in range(config.epochs):
        mlp.train(data, 1)
        loss, _ = loss_and_gradient(mlp.network.weights, other)
        if loss < best:
            best, weights = loss, mlp.network.weights.copy()
    mlp.network.write(weights)
    return mlp


def mlp_examples(data: Data) -> Examples:
    """What the MLP would have seen, prompt by prompt."""
    parts = [
        examples(
            [(s.state, s.signals(), s.acceptance, s.accepted) for s in run],
            COMPRESSION[run[0].compression],
        )
        for run in data.runs()
    ]
    return Examples(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def fit_speckv(train: Data, seed: int) -> Regressor:
    """The paper's regressor, on the signals of the step before."""
    rows, rates, typical = speckv_rows(train, seed)
    try:
        fitted = regressor(rows, rates)
    except ImportError:
        raise UserError(
            "fit: the regressor of SpecKV needs scikit-learn: run pip install scikit-learn"
        ) from None
    (hidden, output), (hidden_bias, output_bias) = fitted.coefs_, fitted.intercepts_
    return Regressor(hidden, hidden_bias, output[:, 0], output_bias[0], typical)


def speckv_rows(data: Data, seed: int) -> tuple[Array, Array, Array]:
    """Features `[rows, 6]`, rates `[rows]` and the mean signals `[4]`.

    A row for each step but a prompt's first and each of the lengths; the step before counts as
    drafted with a random one of them, since what it says depends on its length.
    """
    random = np.random.default_rng(seed)
    rows, rates = [], []
    for run in data.runs():
        for before, step in pairwise(run):
            said = step_signals(before.signals()[: random.choice(GAMMAS)])
            for gamma in GAMMAS:
                rows.append([*said, CODE[step.compression], gamma])
                rates.append(min(step.accepted, gamma) / gamma)
    table = np.array(rows, dtype=np.float64)
    return table, np.array(rates), table[:, :4].mean(0)


def fit_head(train: Data, held: Data, config: Fit) -> AcceptanceHead:
    """The acceptance head at the epoch that is best on ``held``.

    Trained on states and labels of real drafts. The paper makes its inputs by mixing the target's
    tokens with draws of the draft, because it has no real drafts; here that would only add noise.
    """
    torch.manual_seed(config.seed)
    states, labels = head_rows(train)
    other, theirs = head_rows(held)
    head = AcceptanceHead(states.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), HEAD_RATE, weight_decay=HEAD_DECAY)
    best, kept = np.inf, head.state_dict()
    for _ in range(config.epochs):
        for rows in torch.randperm(len(states)).split(HEAD_BATCH):
            optimizer.zero_grad()
            weighted_loss(head(states[rows]), labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(weighted_loss(head(other), theirs))
        if loss < best:
            best, kept = loss, {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(kept)
    return head


def head_rows(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """States `[tokens, width]` after a drafted token on the path was fed, its acceptance."""
    states, labels = [], []
    for step, hidden in zip(data.steps, data.hidden, strict=True):
        known = min(len(step.acceptance), step.gamma - 1)
        states.append(hidden[1 : known + 1])
        labels += step.acceptance[:known]
    return torch.cat(states).float(), torch.tensor(labels)


def tune(file: Path, held: Data) -> float:
    """The threshold with the most tokens per second on ``held``."""

    def speed(threshold: float) -> float:
        policy = SpecDecPp(file)
        policy.threshold = threshold
        return replay.tok_s(replay.replay(follow(policy), held.steps, held.hidden))

    return max(THRESHOLDS, key=speed)


def predictions(out: Path, test: Data, seed: int) -> dict[str, Any]:
    """How each model's predictions hold on ``test``."""
    mlp = Mlp.load(out / "mlp.json")
    data = mlp_examples(test)
    known = ~np.isnan(data.labels[:, 0])
    rows, rates, _ = speckv_rows(test, seed)
    head = SpecDecPp(out / "specdecpp.safetensors").head
    states, labels = head_rows(test)
    with torch.no_grad():
        alpha = head(states).softmax(-1)[:, 1].double().numpy()
    return {
        "mlp": reliability(
            hazards(mlp.network.weights, data.features[known])[:, 0], data.labels[known, 0]
        ),
        "speckv": reliability(Regressor.load(out / "speckv.json").rate(rows), rates),
        "specdecpp": reliability(alpha, labels.double().numpy()),
    }


def compare(out: Path, test: Data) -> dict[str, Any]:
    """Tokens per second of every fixed gamma and every fitted policy, by compression."""
    made: dict[str, Any] = {}
    for compression in dict.fromkeys(step.compression for step in test.steps):
        data = test.of([step.compression == compression for step in test.steps])
        arms = {f"fixed {g}": replay.fixed(g) for g in range(data.steps[0].gamma + 1)}
        names = ("mlp", "speckv", "specdecpp", "specdecpp_by_cost")
        arms |= {
            name: follow(make_policy(name, weights=out, compression=compression)) for name in names
        }
        arms["oracle"] = replay.oracle
        rows = {name: replay.replay(arm, data.steps, data.hidden) for name, arm in arms.items()}
        speeds = {name: replay.tok_s(of) for name, of in rows.items()}
        best = max((n for n in speeds if n.startswith("fixed")), key=lambda n: speeds[n])
        prompts = np.array([step.prompt for step in data.steps])
        made[compression] = {
            "best_fixed": best,
            "tok_s": speeds,
            "over_best_fixed": {
                name: known(replay.over(of, rows[best], prompts)) for name, of in rows.items()
            },
        }
    return made


def _costs(steps: Sequence[Step]) -> tuple[float, float]:
    """Mean milliseconds of one more drafted token, and of a round without any."""
    times = np.array([step.round_ms for step in steps])
    gammas = np.arange(times.shape[1])
    return float(np.polyfit(gammas[1:], times.mean(0)[1:], 1)[0]), float(times[:, 0].mean())


def _show(summary: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table(title="predicted -> observed acceptance by decile, on held-out prompts")
    for column in ("model", "correlation", "error", "curve"):
        table.add_column(column)
    for name, found in summary["predictions"].items():
        curve = " ".join(f"{said:.2f}>{seen:.2f}" for said, seen, _ in found["curve"])
        correlation = found["correlation"]
        shown = "-" if correlation is None else f"{correlation:.3f}"
        table.add_row(name, shown, f"{found['calibration_error']:.3f}", curve)
    console.print(table)
    regimes = summary["tok_s"]
    table = Table(title="expected tokens per second at recorded states; over the best fixed gamma")
    table.add_column("policy")
    for compression, found in regimes.items():
        table.add_column(f"{compression} (best: {found['best_fixed']})", justify="right")
    for name in next(iter(regimes.values()))["tok_s"]:
        cells = []
        for found in regimes.values():
            cells.append(f"{found['tok_s'][name]:.1f}  {spread(found['over_best_fixed'][name])}")
        table.add_row(name, *cells)
    console.print(table)
