"""`tts drafters`: every drafter, static, windowed and learning, on the same recorded paths."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from controllers import make_policy
from experiments.arms import ARMS, build, build_policy
from experiments.curves import Curve, acceptance_curve, interval, known, overlap_curve
from experiments.options import (
    AmountOptions,
    LearningOptions,
    LengthOptions,
    SpeculationOptions,
    TargetOptions,
    check_rule,
)
from experiments.report import number, spread, thirds
from experiments.results import Results
from experiments.turns import Rounds, check_segment, take_turns
from experiments.workload import PathFile, RecordedDialogue
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.metrics import LOOP, WINDOW, distinct_4_windows, summarise
from tts.models import PROMPT_LOOKUP, shipped_drafts
from tts.records import RoundRecord

ALL = "all"
# arm of `tts run` by mode
MODES = {
    "static": "static", "window": "window", "online": "draft", "memory": "memory",
    "memory_online": "memory_draft", "lookup": "lookup", "memory_lookup": "memory_lookup",
}  # fmt: skip


@dataclass(frozen=True)
class Drafters(TargetOptions, AmountOptions, SpeculationOptions, LengthOptions, LearningOptions):
    """Compare drafters, each with a fixed gamma and with the gamma MLP.

    Args:
        drafters: names of shipped drafts, folders, hub ids or prompt_lookup; all is every shipped
            one and prompt_lookup.
        compression: of the target's weights; that of the path.
        path: a file of `tts record`; every arm commits its tokens.
        modes: of static, window, online, memory, memory_online, and with the gamma MLP alone lookup
            and memory_lookup.
        policies: of fixed and mlp.
        gamma: speculation length of fixed.
        segment_tokens: after so many the next arm has its turn.
        results: folder for all results.
        run_id: a new one if empty.
    """

    drafters: tuple[str, ...] = (ALL,)
    compression: str = "none"
    path: str = ""
    modes: tuple[str, ...] = tuple(MODES)
    policies: tuple[str, ...] = ("fixed", "mlp")
    gamma: int = 4
    segment_tokens: int = 48
    conversations: int = 0
    max_new_tokens: int = 3000
    results: str = "results"
    run_id: str = ""

    def __post_init__(self) -> None:
        AmountOptions.__post_init__(self)
        SpeculationOptions.__post_init__(self)
        LengthOptions.__post_init__(self)
        make_policy("fixed", gamma=self.gamma)
        check_rule(self.acceptance, self.temperature, shared=True)
        check_segment(self.segment_tokens)
        for mode in self.modes:
            if mode not in MODES:
                raise UserError(f"modes: {mode!r} is not one of {', '.join(MODES)}")
        for policy in self.policies:
            if policy not in ("fixed", "mlp"):
                raise UserError(f"policies: {policy!r} is not one of fixed, mlp")
        if not self.drafters or not self.modes or not self.policies:
            raise UserError("drafters, modes, policies: name at least one of each")
        if set(self.modes) <= {"lookup", "memory_lookup"} and "mlp" not in self.policies:
            raise UserError("policies: the mode lookup is for the gamma MLP alone: name mlp")


def drafters(config: Drafters) -> dict[str, Any]:
    """Decode the paths with every arm; print the table, return the JSON summary."""
    if not config.path:
        raise UserError("path: give a file of `tts record`")
    path = PathFile.read(config.path)
    path.check_text(config)
    path.check_target(config, config.compression)
    # looping text flatters whatever copies or learns: those windows are left out of the path
    dialogues = [_until_loop(d) for d in path.dialogues[: config.conversations or None]]
    names = config.drafters
    if ALL in names:
        names = (*shipped_drafts(config.target), PROMPT_LOOKUP)
    results = Results(config.results, "drafters", config.run_id, config)
    if results.finished is not None:
        print(f"run_id: {results.folder} is finished with the same config", file=sys.stderr)
        return results.finished
    with results.starting():
        # nobody's overlap is measured beside gamma 0: it would cost 1 to 3 % of its time
        alone = config.load(PROMPT_LOOKUP, config.compression)
        arms = {"target": build("target", alone, config, make_policy("fixed", gamma=0))}
        for name in names:
            arms |= _arms(name, config)
        if len(arms) == 1:
            raise UserError("modes: prompt_lookup knows static alone: name it, or another drafter")

    def keep(arm: str, dialogue: RecordedDialogue, part: list[RoundRecord]) -> None:
        for record in part:
            results.append(
                "metrics.jsonl", {"arm": arm, "conversation": dialogue.id, **asdict(record)}
            )

    rows: dict[str, Any] = {}
    summary = {"results": str(results.folder), "status": "interrupted", "arms": rows}
    try:
        rounds = take_turns(arms, dialogues, config, config.segment_tokens, keep)
        rows |= {arm: _row(arm, rounds) for arm in rounds}
        summary["status"] = "finished"
    finally:
        results.finish(summary)
    _show(rows, config)
    return summary


def _arms(name: str, config: Drafters) -> dict[str, SpeculativeDecoder]:
    """The decoders of one drafter, by the name of their row."""
    pair = config.load(name, config.compression)
    made = {}
    for policy in config.policies:
        for mode in config.modes:
            if name == PROMPT_LOOKUP and mode != "static":
                continue  # nothing to train, no state to remember by, and it copies from anywhere
            if ARMS[MODES[mode]].policy not in ("", policy):
                continue  # copies are for the MLP, which knows what they cost
            lengths = build_policy(policy, config.gamma, pair, config)
            made[f"{name}, {mode}, {policy}"] = build(
                MODES[mode], pair, config, lengths, config.learning
            )
    return made


def _until_loop(dialogue: RecordedDialogue) -> RecordedDialogue:
    """Turns and answers up to the first window of tokens that repeats itself."""
    tokens = [token for answer in dialogue.answers for token in answer]
    windows = distinct_4_windows(tokens)
    left = next((WINDOW * i for i, value in enumerate(windows) if value < LOOP), len(tokens))
    kept = []
    for answer in dialogue.answers:
        kept.append(answer[:left])
        left -= len(kept[-1])
    answers = [answer for answer in kept if answer]
    return replace(dialogue, turns=dialogue.turns[: len(answers)], answers=answers)


def _row(arm: str, rounds: Rounds) -> dict[str, Any]:
    """What one arm did; every interval is a 95 % bootstrap over conversations."""
    texts = rounds[arm]
    summary = summarise(r for of in texts.values() for r in of)

    def over_texts(value: Callable[[Any], float | None]) -> list[float | None]:
        values = [value(summarise(of)) for of in texts.values()]
        return known(interval([math.nan if x is None else x for x in values]))

    def third(curve: Callable[[Any, Sequence[int]], Curve]) -> list[float | None]:
        return known(thirds(texts, curve))

    times = {
        text: sum(r.total_ms for r in rounds["target"][text]) / sum(r.total_ms for r in of)
        for text, of in texts.items()
    }
    return {
        "tok_s": summary.tok_s,
        "over_target": known(interval(list(times.values()))),
        "acceptance_length": over_texts(lambda s: s.mean_acceptance_length),
        "overlap": over_texts(lambda s: s.mean_overlap),
        "acceptance_length_by_third": third(acceptance_curve),
        "overlap_by_third": third(overlap_curve),
        **{
            f"{part}_share": getattr(summary, f"{part}_ms") / summary.total_ms
            for part in ("draft", "verify", "update", "policy")
        },
        "updates": summary.num_updates,
        "taken_back": summary.num_taken_back,
        "update_ms": summary.update_ms / summary.num_updates if summary.num_updates else None,
        "tokens": summary.num_emitted_tokens,
    }


def _show(rows: dict[str, Any], config: Drafters) -> None:
    table = Table(
        title=f"{rows['target']['tokens']} tokens an arm, gamma {config.gamma} where fixed, window "
        f"{config.window}; ratios to gamma 0, paired; shares of time"
    )
    columns = ("arm", "tok/s", "/ gamma 0", "AL", "AL by third", "overlap", "overlap by third",
               "draft", "verify", "update")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, row in rows.items():
        table.add_row(
            arm, number(row["tok_s"], 1), spread(row["over_target"]),
            spread(row["acceptance_length"]),
            " ".join(number(x, 2) for x in row["acceptance_length_by_third"]),
            spread(row["overlap"]),
            " ".join(number(x, 3) for x in row["overlap_by_third"]),
            *(number(row[f"{part}_share"], 3) for part in ("draft", "verify", "update")),
        )  # fmt: skip
    Console(width=180).print(table)
