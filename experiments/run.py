"""`tts run`: decode conversations with every arm on one text, show the curve over the output."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.arms import ARMS, check_arms
from experiments.curves import CURVES, Rounds, bin_edges
from experiments.decode import decode, recorded
from experiments.live import Live
from experiments.options import ModelOptions, SpeculationOptions, TextOptions
from experiments.plots import position_figure
from experiments.report import arms_table
from experiments.results import Results
from experiments.trackers import MODES, make_tracker
from experiments.workload import Dialogue, PathFile, RecordedDialogue, dialogues
from tts.errors import UserError
from tts.metrics import LOOP, distinct_4, distinct_4_windows, summarise
from tts.records import RoundRecord


@dataclass(frozen=True)
class Run(ModelOptions, TextOptions, SpeculationOptions):
    """Decode conversations and show acceptance over the output position.

    The first arm writes the text, unless a path is given; all others commit the same tokens.

    Args:
        arms: of target (gamma 0), static, window.
        path: a file of `tts record`; every arm commits its tokens.
        results: folder for all results.
        run_id: a new one if empty.
        wandb: disabled, offline or online.
    """

    arms: tuple[str, ...] = ("static", "window")
    path: str = ""
    results: str = "results"
    run_id: str = ""
    wandb: str = "disabled"

    def __post_init__(self) -> None:
        TextOptions.__post_init__(self)
        SpeculationOptions.__post_init__(self)
        check_arms(self.arms)
        if self.wandb not in MODES:
            raise UserError(f"wandb: {self.wandb!r} is not one of {', '.join(MODES)}")


@dataclass(frozen=True)
class Record(ModelOptions, TextOptions, SpeculationOptions):
    """Write the token path of conversations once, so that any later run can commit it.

    Args:
        out: file to write; it must not exist.
    """

    out: str = "path.json"
    gamma: int = 0

    def __post_init__(self) -> None:
        TextOptions.__post_init__(self)
        SpeculationOptions.__post_init__(self)


def run(config: Run) -> dict[str, Any]:
    """Decode, write the results folder, print the table; returns the JSON summary."""
    texts = _texts(config)
    results = Results(config.results, "run", config.run_id, config)
    if results.finished is not None:
        print(f"run_id: {results.folder} is finished with the same config", file=sys.stderr)
        return results.finished
    arms: dict[str, dict[str, list[RoundRecord]]] = {name: {} for name in config.arms}
    samples: list[dict[str, Any]] = []
    status = "interrupted"
    tracker = make_tracker(config.wandb, results.folder.name, str(results.folder), asdict(config))
    try:
        pair = config.load()
        for text in texts:
            current: Dialogue | RecordedDialogue = text
            for name in config.arms:
                rounds = arms[name].setdefault(text.id, [])
                with Live(f"{text.id} {name}", config.max_new_tokens) as live:

                    def on_round(turn: int, record: RoundRecord, new: list[int]) -> None:
                        rounds.append(record)
                        row = {"arm": name, "conversation": text.id, "turn": turn,
                               "seed": config.seed + text.seed, **asdict(record)}  # fmt: skip
                        results.append("metrics.jsonl", row)
                        tracker.log(_tracked(name, record))
                        live.show(rounds)

                    done = decode(ARMS[name](pair, config), current, config, on_round)
                if isinstance(current, Dialogue):
                    current = recorded(text, done)
                samples.append(_sample(pair, name, text.id, done))
                results.append("samples.jsonl", samples[-1])
        status = "finished"
    finally:
        # an interruption loses nothing that was measured
        tracker.close()
        summary = _summarise(config, arms, samples, results.folder)
        results.finish(summary, status)
    _print(config, arms, samples, results.folder)
    return summary | {"status": status}


def record(config: Record) -> dict[str, Any]:
    """Decode the workload once and write its path; returns the JSON summary."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out: {out} exists: choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = dialogues(config)
    pair = config.load()
    written: list[RecordedDialogue] = []
    for text in texts:
        rounds: list[RoundRecord] = []
        with Live(text.id, config.max_new_tokens) as live:

            def on_round(turn: int, record: RoundRecord, new: list[int]) -> None:
                rounds.append(record)
                live.show(rounds)

            done = decode(ARMS["static"](pair, config), text, config, on_round)
        written.append(recorded(text, done))
        _path_file(config, written).write(out)  # after every conversation: nothing is lost
        _print_loops(text.id, done.tokens)
    return {"out": str(out), "tokens": sum(len(a) for d in written for a in d.answers)}


def _texts(config: Run) -> list[Dialogue] | list[RecordedDialogue]:
    if not config.path:
        return dialogues(config)
    path = PathFile.read(config.path)
    path.check(config, config.target)
    return path.dialogues[: config.conversations or None]


def _path_file(config: Record, written: list[RecordedDialogue]) -> PathFile:
    return PathFile(
        config.target, config.dtype, config.temperature, config.top_p, config.top_k,
        config.repetition_penalty, written,
    )  # fmt: skip


def _sample(pair: Any, arm: str, conversation: str, done: Any) -> dict[str, Any]:
    tokens = done.tokens
    windows = distinct_4_windows(tokens)
    return {
        "arm": arm,
        "conversation": conversation,
        "tokens": len(tokens),
        "distinct_4": distinct_4(tokens),
        "distinct_4_per_1000": windows,
        "loops": [i for i, value in enumerate(windows) if value < LOOP],
        "turns": [
            {"user": user, "assistant": pair.tokenizer.decode(answer), "finish_reason": reason}
            for user, answer, reason in zip(
                done.turns, done.answers, done.finish_reasons, strict=True
            )
        ],
    }


def _tracked(arm: str, record: RoundRecord) -> dict[str, Any]:
    overlap = sum(record.overlap) / len(record.overlap) if record.overlap else None
    return {
        "tokens": record.position,
        f"{arm}/num_accepted": record.num_accepted,
        f"{arm}/num_drafted": record.num_drafted,
        f"{arm}/overlap": overlap,
        f"{arm}/total_ms": record.total_ms,
    }


def _summarise(
    config: Run,
    arms: dict[str, dict[str, list[RoundRecord]]],
    samples: list[dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """Pooled summaries, curves of every conversation, and the figure."""
    measured = {name: {k: v for k, v in c.items() if v} for name, c in arms.items()}
    measured = {name: c for name, c in measured.items() if c}
    if measured:
        models = f"{config.target}, {config.dtype}, temperature {config.temperature}"
        caption = f"{models}, gamma {config.gamma}, seed {config.seed}, n = {len(samples)} texts"
        position_figure(
            measured, ("overlap", "acceptance_length"),
            folder / "acceptance_vs_position.png", caption,
        )  # fmt: skip
    longest = max(
        (r.position + r.num_emitted for c in measured.values() for v in c.values() for r in v),
        default=0,
    )
    edges = bin_edges(longest, 250)
    return {
        "results": str(folder),
        "arms": {
            name: asdict(summarise(r for rounds in c.values() for r in rounds))
            for name, c in measured.items()
        },
        "curves": {
            quantity: {
                name: {key: asdict(curve(rounds, edges)) for key, rounds in c.items()}
                for name, c in measured.items()
            }
            for quantity, curve in CURVES.items()
        },
        "distinct_4_per_1000": {
            f"{s['conversation']}/{s['arm']}": s["distinct_4_per_1000"] for s in samples
        },
        "loops": [f"{s['conversation']}/{s['arm']}" for s in samples if s["loops"]],
    }


def _print(
    config: Run, arms: dict[str, dict[str, Rounds]], samples: list[dict[str, Any]], folder: Path
) -> None:
    console = Console()
    console.print(arms_table(arms, f"{config.target}, gamma {config.gamma}, {config.acceptance}"))
    for sample in samples:
        if sample["loops"]:
            console.print(
                f"[yellow]{sample['conversation']} {sample['arm']} loops in windows "
                f"{sample['loops']} of 1,000 tokens: its acceptance is flattered"
            )
    console.print(f"figure and records: {folder}")


def _print_loops(conversation: str, tokens: list[int]) -> None:
    windows = distinct_4_windows(tokens)
    values = " ".join(f"{value:.2f}" for value in windows)
    flag = "  LOOPS" if any(value < LOOP for value in windows) else ""
    print(f"{conversation}: {len(tokens)} tokens, distinct-4 per 1,000: {values}{flag}")
