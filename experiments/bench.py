"""`tts bench`: tokens per second beside transformers' own ways to decode, in one process.

Arms take turns on the same prompts, several segments of growing context, so that a machine whose
speed drifts slows all of them. Every arm is timed from its first token to its last; the prompt is
not counted. End-of-sequence is held back, so that all write equally many tokens.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from controllers import make_policy
from experiments.options import (
    MATCH,
    WINDOW,
    ModelOptions,
    SamplingOptions,
    check_rule,
    check_window,
)
from experiments.peers import Arm, peers
from experiments.report import number
from experiments.results import Results
from experiments.workload import PathFile, RecordedDialogue
from tts.acceptance import check_acceptance
from tts.chat import ChatFormat
from tts.distill.config import DistillConfig
from tts.drafting import Memory, PromptLookup
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.models import ModelPair
from tts.policy import LengthPolicy


@dataclass(frozen=True)
class Bench(ModelOptions, SamplingOptions):
    """Tokens per second against transformers, arms interleaved.

    Args:
        path: recorded conversations whose prefixes are the prompts.
        segments: prompts; each arm decodes each once.
        segment_tokens: new tokens an arm and segment.
        gammas: our fixed lengths; 0 is the target alone.
        lengths: transformers' constant lengths.
        window: sliding window over the draft's context.
        acceptance: of our arms; all but coupled write text of their own.
        learners: also time the gamma MLP, the draft that learns, and the one that remembers.
        learning_gamma: fixed length of one more arm whose draft learns (0: none).
        distill: how the draft learns.
        memory: what it remembers of the target's words.
        peers: also time transformers.
        results: folder for all results.
        run_id: a new one if empty.
    """

    path: str = ""
    segments: int = 6
    segment_tokens: int = 96
    gammas: tuple[int, ...] = (0, 1, 2, 3, 4)
    lengths: tuple[int, ...] = (1, 2, 3, 4)
    window: int = WINDOW
    acceptance: str = "block"
    learners: bool = True
    learning_gamma: int = 0
    # a segment is short: what they learn is carried from one to the next
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(scope="session"))
    memory: Memory = field(default_factory=Memory)
    peers: bool = True
    results: str = "results"
    run_id: str = ""

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        if self.segments < 1 or self.segment_tokens < 2:
            raise UserError("segments, segment_tokens: use at least 1 and 2")
        for gamma in (*self.gammas, *self.lengths, self.learning_gamma):
            make_policy("fixed", gamma=gamma)
        check_acceptance(self.acceptance)
        check_rule(self.acceptance, self.temperature, shared=False)
        check_window(self.window)
        if not (self.gammas or self.learners or self.peers):
            raise UserError("gammas: none given, nor learners or peers: there is nothing to time")


class Clock:
    """A streamer that notes when tokens come; the first put is the prompt, the second prefill."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        self._marks.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        pass

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first ones / seconds since then."""
        (began, _), *later = self._marks[1:]
        if not later:
            raise UserError("segment_tokens: they came in one round: use more")
        return sum(count for _, count in later) / (later[-1][0] - began)


def bench(config: Bench) -> dict[str, Any]:
    """Time all arms, print the table, write the results folder; returns the summary."""
    if not config.path:
        raise UserError("path: give a file of `tts record`: its conversations are the prompts")
    path = PathFile.read(config.path)
    path.check_target(config)
    results = Results(config.results, "bench", config.run_id, config)
    if results.finished is not None:
        print(f"run_id: {results.folder} is finished with the same config", file=sys.stderr)
        return results.finished
    with results.starting():
        pair = config.load(config.draft, config.compression)
        prompts = _prompts(path.dialogues, config.segments, pair)
        arms = _arms(config, pair)
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    generation = config.generation_config(config.segment_tokens)
    generation.min_new_tokens = config.segment_tokens
    for arm in arms.values():  # warm up: kernels, allocator
        arm(prompts[0][:, -64:], config.generation_config(8), 0, Clock())
    status = "interrupted"
    try:
        for index, prompt in enumerate(prompts):
            # every segment starts with another arm
            order = list(arms)[index % len(arms) :] + list(arms)[: index % len(arms)]
            for name in order:
                clock = Clock()
                arms[name](prompt, generation, config.seed + index, clock)
                speeds[name].append(clock.tokens_per_second)
                row = {"arm": name, "segment": index, "context": prompt.shape[1],
                       "tok_s": speeds[name][-1], "load": os.getloadavg()[0]}  # fmt: skip
                results.append("metrics.jsonl", row)
                print(row, file=sys.stderr)
        status = "finished"
    finally:
        summary = _summary(speeds, results, status)
        results.finish(summary)
    _show(speeds, [prompt.shape[1] for prompt in prompts])
    return summary


def _prompts(
    recorded: list[RecordedDialogue], segments: int, pair: ModelPair
) -> list[torch.Tensor]:
    """Prefixes of the recorded conversations, each cut before an answer, later and later."""
    chat = ChatFormat.of(pair.tokenizer)
    made = []
    for index in range(segments):
        dialogue = recorded[index % len(recorded)]
        turns = 1 + round((len(dialogue.answers) - 1) * index / max(1, segments - 1))
        sequence: list[int] = []
        for user, answer in list(zip(dialogue.turns, dialogue.answers, strict=True))[:turns]:
            ids = pair.tokenizer(user, add_special_tokens=False)["input_ids"]
            sequence += chat.user_turn(ids, sequence)
            prompt = torch.tensor([sequence])
            sequence = sequence + answer
        made.append(prompt)
    return made


def _arms(config: Bench, pair: ModelPair) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}

    # nobody's overlap is measured beside gamma 0: it would cost 1 to 3 % of its time
    alone = pair._replace(draft=PromptLookup())

    def add(name: str, policy: LengthPolicy, pair: ModelPair = pair, **settings: Any) -> None:
        common = {"acceptance": config.acceptance, "draft_window": config.window}
        arms[f"ours, gamma {name}"] = _ours(pair, policy=policy, **common, **settings)

    for gamma in config.gammas:
        add(str(gamma), make_policy("fixed", gamma=gamma), pair if gamma else alone)
    if config.learners:
        learns, remembers = {"distill": config.distill}, {"memory": config.memory}
        copies = {"lookup": PromptLookup(shortest=MATCH)}
        for name, settings in (
            ("", {}),
            (" and draft learn", learns),
            (", lookup", copies),
            (" and draft learn, lookup", learns | copies),
            (", memory", remembers),
            (", memory, lookup", remembers | copies),
            (" and draft learn, memory, lookup", learns | remembers | copies),
        ):
            add(f"MLP{name}", make_policy("mlp", compression=pair.compression), **settings)
        for gamma in filter(None, config.gammas):
            add(f"{gamma}, memory", make_policy("fixed", gamma=gamma), **remembers)
        if (gamma := config.learning_gamma) > 0:
            add(f"{gamma}, draft learns", make_policy("fixed", gamma=gamma), **learns)
    return arms | peers(config, pair.target, config.lengths) if config.peers else arms


def _ours(pair: ModelPair, **settings: Any) -> Arm:
    decoder = SpeculativeDecoder(pair, **settings)

    def arm(prompt: torch.Tensor, config: GenerationConfig, seed: int, clock: Clock) -> None:
        decoder.generate(prompt, generation_config=config, seed=seed, streamer=clock)

    return arm


def _summary(speeds: dict[str, list[float]], results: Results, status: str) -> dict[str, Any]:
    return {
        "results": str(results.folder),
        "status": status,
        "load": os.getloadavg(),
        "tok_s_median": {name: statistics.median(of) for name, of in speeds.items() if of},
        "tok_s": speeds,
    }


def _show(speeds: dict[str, list[float]], contexts: list[int]) -> None:
    table = Table(title=f"tokens per second; contexts {contexts}; load {os.getloadavg()[0]:.1f}")
    table.add_column("arm")
    for column in ("median", "min", "max", "/ gamma 0", "/ plain"):
        table.add_column(column, justify="right")
    alone, plain = speeds.get("ours, gamma 0"), speeds.get("transformers, plain")
    for name, values in sorted(speeds.items(), key=lambda item: -statistics.median(item[1])):
        ratios = [
            number(statistics.median(a / b for a, b in zip(values, base, strict=True)), 2)
            if base
            else "-"
            for base in (alone, plain)
        ]
        spread = (number(x, 1) for x in (statistics.median(values), min(values), max(values)))
        table.add_row(name, *spread, *ratios)
    Console().print(table)
