"""`tts run`: decode conversations with every arm on one text, show the curve over the output."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.arms import ARMS, LASTING, build, build_policy, check_arms, policy_of
from experiments.curves import BIN, CURVES, ahead_from, bin_edges, length
from experiments.decode import Decoded, OnRound, decode, recorded
from experiments.live import Live
from experiments.options import (
    LearningOptions,
    ModelOptions,
    PolicyOptions,
    SpeculationOptions,
    TextOptions,
    check_rule,
)
from experiments.plots import position_figure
from experiments.report import arms_table
from experiments.results import Results
from experiments.trackers import MODES, make_tracker
from experiments.workload import Dialogue, PathFile, RecordedDialogue, dialogues
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.metrics import LOOP, distinct_4, distinct_4_windows, summarise
from tts.models import ModelPair
from tts.records import RoundRecord
from tts.state import load_state, save_state


@dataclass(frozen=True)
class Run(ModelOptions, TextOptions, SpeculationOptions, PolicyOptions, LearningOptions):
    """Decode conversations and show acceptance over the output position.

    The first arm writes the text, unless a path is given; all others commit the same tokens.

    Args:
        arms: of target (gamma 0), static, window, draft, draft_window, gamma, both, lookup,
            lookup_both, memory, memory_draft, memory_gamma, memory_both, memory_lookup, and the
            published policies by their names: svip, confidence, ...
        path: a file of `tts record`; every arm commits its tokens.
        learned: results folder of another run; these arms go on from what they had learned there.
        results: folder for all results.
        run_id: a new one if empty.
        wandb: disabled, offline or online.
    """

    arms: tuple[str, ...] = (
        "target", "static", "draft", "gamma", "both", "memory", "memory_lookup",
    )  # fmt: skip
    path: str = ""
    learned: str = ""
    results: str = "results"
    run_id: str = ""
    wandb: str = "offline"

    def __post_init__(self) -> None:
        TextOptions.__post_init__(self)
        SpeculationOptions.__post_init__(self)
        PolicyOptions.__post_init__(self)
        check_arms(self.arms, self.draft)
        check_rule(self.acceptance, self.temperature, bool(self.path) or len(self.arms) > 1)
        if not self.path and policy_of(self.arms[0], self)[0] == "oracle":
            raise UserError(
                "arms: the first one writes the text, oracle needs it in advance: give a path, or "
                "put another arm first"
            )
        learns = self.draft_updates and any(ARMS[arm].draft for arm in self.arms)
        if self.learned and learns and self.distill.scope == "sequence":
            raise UserError(
                "learned: with scope sequence a draft forgets at once: use --distill.scope session"
            )
        if self.wandb not in MODES:
            raise UserError(f"wandb: {self.wandb!r} is not one of {', '.join(MODES)}")


def run(config: Run) -> dict[str, Any]:
    """Decode, write the results folder, print the table; returns the JSON summary."""
    texts = _texts(config)
    results = Results(config.results, "run", config.run_id, config)
    if results.finished is not None:
        print(f"run_id: {results.folder} is finished with the same config", file=sys.stderr)
        return _brief(results.finished)
    with results.starting():
        pair = config.load(config.draft, config.compression)
        arms = {arm: _decoder(arm, pair, config) for arm in config.arms}
        learners = {
            arm: decoder
            for arm, decoder in arms.items()
            if decoder.coordinator or policy_of(arm, config)[0] in LASTING
        }
        if config.learned:
            if not learners:
                raise UserError("learned: none of these arms learns: leave it out")
            for arm, decoder in learners.items():
                load_state(decoder, _learned(Path(config.learned).expanduser(), arm))
    measured = Measured(config, results)
    status = "interrupted"
    try:
        for text in texts:
            current: Dialogue | RecordedDialogue = text
            for arm, decoder in arms.items():
                with Live(f"{text.id} {arm}", config.max_new_tokens) as live:
                    observer = measured.observer(arm, text, live.show)
                    done = decode(decoder, current, config, observer)
                measured.sample(pair, arm, text.id, done)
                if isinstance(current, Dialogue):
                    current = recorded(text, done)
        status = "finished"
    finally:
        # an interruption loses nothing that was measured
        summary = measured.finish(status)
        for arm, decoder in learners.items():
            save_state(decoder, _learned(results.folder, arm))
    measured.show(summary)
    return _brief(summary)


class Measured:
    """Everything a run has measured so far, in memory and in its results folder."""

    def __init__(self, config: Run, results: Results) -> None:
        self._config, self._results = config, results
        self._arms: dict[str, dict[str, list[RoundRecord]]] = {}
        self._samples: list[dict[str, Any]] = []
        self._tracker = make_tracker(
            config.wandb, results.folder.name, str(results.folder), asdict(config)
        )

    def observer(
        self,
        arm: str,
        text: Dialogue | RecordedDialogue,
        show: Callable[[list[RoundRecord]], None],
    ) -> OnRound:
        """Called after every round of ``arm`` on ``text``."""
        rounds = self._arms.setdefault(arm, {}).setdefault(text.id, [])
        head = {
            "arm": arm,
            "conversation": text.id,
            "seed": self._config.seed + text.seed,
            "compression": self._config.compression,
        }

        def on_round(turn: int, record: RoundRecord) -> None:
            rounds.append(record)
            self._results.append("metrics.jsonl", head | {"turn": turn} | asdict(record))
            self._tracker.log(
                {"tokens": record.position, f"{arm}/num_accepted": record.num_accepted,
                 f"{arm}/num_drafted": record.num_drafted, f"{arm}/total_ms": record.total_ms}
            )  # fmt: skip
            show(rounds)

        return on_round

    def sample(self, pair: ModelPair, arm: str, conversation: str, done: Decoded) -> None:
        """Keep the text of one dialogue, and say whether it loops."""
        windows = distinct_4_windows(done.tokens)
        turns = zip(done.turns, done.answers, done.finish_reasons, strict=True)
        self._samples.append(
            {
                "arm": arm,
                "conversation": conversation,
                "tokens": len(done.tokens),
                "distinct_4": distinct_4(done.tokens),
                "distinct_4_per_1000": windows,
                "loops": [i for i, value in enumerate(windows) if value < LOOP],
                "turns": [
                    {"user": user, "assistant": pair.tokenizer.decode(answer), "finish": reason}
                    for user, answer, reason in turns
                ],
            }
        )
        self._results.append("samples.jsonl", self._samples[-1])

    def finish(self, status: str) -> dict[str, Any]:
        """Write figure and summary; returns the summary."""
        self._tracker.close()
        self._arms = {
            arm: {text: rounds for text, rounds in texts.items() if rounds}
            for arm, texts in self._arms.items()
            if any(texts.values())
        }
        static, edges = self._arms.get("static", {}), bin_edges(self._config.max_new_tokens, BIN)
        ahead = {
            f"{text}/{arm}": ahead_from(static[text], rounds, edges)
            for arm, texts in self._arms.items()
            for text, rounds in texts.items()
            if arm != "static" and text in static
        }
        pooled = {arm: [r for t in texts.values() for r in t] for arm, texts in self._arms.items()}
        summary = {
            "results": str(self._results.folder),
            "status": status,
            "compression": self._config.compression,
            "arms": {arm: asdict(summarise(rounds)) for arm, rounds in pooled.items()},
            "distinct_4_per_1000": {
                f"{s['conversation']}/{s['arm']}": s["distinct_4_per_1000"] for s in self._samples
            },
            "ahead_of_static_from": ahead,
            "loops": [f"{s['conversation']}/{s['arm']}" for s in self._samples if s["loops"]],
        }
        if pooled:
            longest = max(length(r) for texts in self._arms.values() for r in texts.values())
            summary["curves"] = self._curves(bin_edges(longest, BIN))
        self._results.finish(summary)
        if pooled:
            position_figure(
                self._arms, ("overlap", "acceptance_length", "gamma"),
                self._results.folder / "acceptance_vs_position.png", self._caption(), BIN,
            )  # fmt: skip
        return summary

    def show(self, summary: dict[str, Any]) -> None:
        """The table, where an arm has paid for itself, and a warning for every loop."""
        console = Console(width=120)  # the table has six columns, also in a log
        console.print(arms_table(self._arms, self._caption()))
        for name, position in summary["ahead_of_static_from"].items():
            when = "not yet" if position is None else f"from token {position} on"
            console.print(f"{name}: less time than static {when}")
        for sample in self._samples:
            if sample["loops"]:
                console.print(
                    f"{sample['conversation']} {sample['arm']} repeats itself in windows "
                    f"{sample['loops']} of 1,000 tokens, which flatters its acceptance"
                )
        console.print(f"records and figure: {self._results.folder}", soft_wrap=True)

    def _curves(self, edges: list[int]) -> dict[str, Any]:
        """quantity -> arm -> conversation -> [[position, value], ...], what is missing left out."""
        return {
            quantity: {
                arm: {text: _points(curve(rounds, edges)) for text, rounds in texts.items()}
                for arm, texts in self._arms.items()
            }
            for quantity, curve in CURVES.items()
        }

    def _caption(self) -> str:
        c = self._config
        texts = max((len(texts) for texts in self._arms.values()), default=0)
        return (
            f"{c.target}, {c.dtype}, compression {c.compression}, "
            f"{Path(c.path).stem if c.path else c.workload}, "
            f"temperature {c.temperature}, top-p {c.top_p}, {c.acceptance}, "
            f"gamma {c.gamma}, seed {c.seed}, n = {texts}"
        )


def _decoder(arm: str, pair: ModelPair, config: Run) -> SpeculativeDecoder:
    policy = build_policy(*policy_of(arm, config), pair, config)
    return build(arm, pair, config, policy, config.learning)


def _learned(folder: Path, arm: str) -> Path:
    """The file of what ``arm`` has learned in a run."""
    return folder / f"{arm}.safetensors"


def _texts(config: Run) -> list[Dialogue] | list[RecordedDialogue]:
    if not config.path:
        return dialogues(config)
    path = PathFile.read(config.path)
    path.check_text(config)
    path.check_target(config, config.compression)
    return path.dialogues[: config.conversations or None]


def _points(curve: Any) -> list[tuple[float, float]]:
    return [
        (position, value)
        for position, value in zip(curve.position, curve.value, strict=True)
        if not math.isnan(value)
    ]


def _brief(summary: dict[str, Any]) -> dict[str, Any]:
    """Without the curves, for the last line of stdout."""
    return {key: value for key, value in summary.items() if key != "curves"}
