"""`tts policies`: every length policy on the same recorded paths, one regime a path.

A regime is a compression of the target: each path was recorded with its own. All arms commit the
path's tokens and take turns every few dozen of them, so that a machine whose speed drifts slows all
alike; what an arm learns and caches stays its own.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from controllers import PUBLISHED, make_policy
from controllers.or_none import OrNone
from experiments.arms import ARMS, build, build_policy, check_arms
from experiments.curves import known, ratio_interval
from experiments.options import (
    AmountOptions,
    LengthOptions,
    SpeculationOptions,
    TargetOptions,
    check_rule,
)
from experiments.report import spread
from experiments.results import Results
from experiments.turns import Rounds, check_segment, take_turns
from experiments.workload import PathFile, RecordedDialogue
from tts.drafting import PromptLookup
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.metrics import Summary, summarise
from tts.models import PROMPT_LOOKUP, ModelPair
from tts.records import RoundRecord

OURS, ORACLE = "gamma", "oracle"
RATIOS = (
    "measured_over_best_fixed", "priced_over_best_fixed", "priced_over_oracle", "priced_over_ours",
)  # fmt: skip


@dataclass(frozen=True)
class Policies(TargetOptions, AmountOptions, SpeculationOptions, LengthOptions):
    """Compare length policies with the best fixed gamma in hindsight, and with the oracle.

    Args:
        draft: folder, hub id, prompt_lookup, or a shipped one by name (None: the first, eagle3).
        paths: files of `tts record`, each of another compression of the target.
        gammas: fixed lengths; the best of them in hindsight is what the others are compared with.
        arms: policies, by the names that `tts run` has for them; gamma is ours.
        remember: give the draft of every arm a memory.
        or_none: of these arms, also a variant that may stop drafting.
        segment_tokens: after so many the next arm has its turn.
        results: folder for all results.
        run_id: a new one if empty.
    """

    draft: str | None = None
    paths: tuple[str, ...] = ()
    gammas: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8)
    arms: tuple[str, ...] = (OURS, *PUBLISHED, ORACLE)
    remember: bool = False
    or_none: tuple[str, ...] = ("svip", "confidence", "speckv", "specdecpp")
    segment_tokens: int = 32
    conversations: int = 0
    max_new_tokens: int = 384
    results: str = "results"
    run_id: str = ""

    def __post_init__(self) -> None:
        AmountOptions.__post_init__(self)
        SpeculationOptions.__post_init__(self)
        LengthOptions.__post_init__(self)
        if self.remember and self.draft == PROMPT_LOOKUP:
            raise UserError(f"remember: {self.draft} has no states to remember by: give a model")
        check_rule(self.acceptance, self.temperature, shared=True)
        check_arms(self.arms, self.draft)
        if self.or_none:
            check_arms(self.or_none, self.draft)
        if ORACLE in self.or_none:
            raise UserError("or_none: oracle knows when not to draft: leave it out")
        learning = [name for name in (*self.arms, *self.or_none) if ARMS[name].draft]
        if learning:
            raise UserError(f"arms: {learning[0]} lets the draft learn: lengths are compared here")
        bare = [name for name in (*self.arms, *self.or_none) if not ARMS[name].policy]
        if bare:
            raise UserError(f"arms: {bare[0]} has no policy of its own: name lengths by gammas")
        if not self.gammas:
            raise UserError("gammas: none given: the best fixed one is what others are held to")
        for gamma in self.gammas:
            make_policy("fixed", gamma=gamma)
        check_segment(self.segment_tokens)


def policies(config: Policies) -> dict[str, Any]:
    """Decode every path with every arm; print a table a path, return the JSON summary."""
    if not config.paths:
        raise UserError("paths: give files of `tts record`, one a compression")
    paths = {}
    for name in config.paths:
        path = PathFile.read(name)
        path.check_text(config)
        path.check_target(config)
        if path.compression in paths:
            raise UserError(f"paths: two of them are of compression {path.compression}: give one")
        paths[path.compression] = path.dialogues[: config.conversations or None]
    results = Results(config.results, "policies", config.run_id, config)
    if results.finished is not None:
        print(f"run_id: {results.folder} is finished with the same config", file=sys.stderr)
        return results.finished
    regimes: dict[str, Any] = {}
    summary = {"results": str(results.folder), "status": "interrupted", "regimes": regimes}
    try:
        for compression, dialogues in paths.items():
            with results.starting():
                arms = _arms(config, config.load(config.draft, compression))
            keep = partial(_keep, results, compression)
            rounds = take_turns(arms, dialogues, config, config.segment_tokens, keep)
            regimes[compression] = compare(rounds, [f"fixed {g}" for g in config.gammas])
            regimes[compression]["load"] = os.getloadavg()[0]
            _show(compression, regimes[compression])
        summary["status"] = "finished"
    finally:
        results.finish(summary)
    return summary


def _keep(
    results: Results,
    compression: str,
    arm: str,
    dialogue: RecordedDialogue,
    part: list[RoundRecord],
) -> None:
    head = {"arm": arm, "conversation": dialogue.id, "compression": compression}
    for record in part:
        results.append("metrics.jsonl", head | asdict(record))


def _arms(config: Policies, pair: ModelPair) -> dict[str, SpeculativeDecoder]:
    def arm(name: str, gamma: int = 0) -> SpeculativeDecoder:
        policy = build_policy(ARMS[name].policy or "fixed", gamma, pair, config)
        return build(name, pair, config, policy, remember=config.remember)

    # gamma 0 pays for nobody's overlap
    alone = pair._replace(draft=PromptLookup())
    none = build("target", alone, config, make_policy("fixed", gamma=0))
    made = {f"fixed {gamma}": arm("window", gamma) if gamma else none for gamma in config.gammas}
    made |= {name: arm(name) for name in config.arms}
    for name in config.or_none:
        decoder = arm(name)
        decoder.policy = OrNone(decoder.policy)
        made[f"{name} or none"] = decoder
    return made


def compare(rounds: Rounds, fixed: list[str]) -> dict[str, Any]:
    """Every arm's speed, where its time goes, and the ratios to those it is held to.

    All arms emit the same tokens, so a ratio of speeds is one of times; its interval is a 95 %
    bootstrap over conversations, paired.
    """
    pooled = {arm: summarise(r for t in texts.values() for r in t) for arm, texts in rounds.items()}
    times = {
        arm: np.array([sum(r.total_ms for r in rounds) for rounds in texts.values()])
        for arm, texts in rounds.items()
    }
    price = prices(rounds)
    priced = {
        arm: np.array(
            [sum(price[_kind(r)] + r.policy_ms for r in rounds) for rounds in texts.values()]
        )
        for arm, texts in rounds.items()
    }
    best = min(fixed, key=lambda arm: priced[arm].sum())
    held_to = {"best_fixed": best, "oracle": ORACLE, "ours": OURS}
    return {
        "best_fixed": best,
        "round_ms": {f"{drafted}+{copied}": ms for (drafted, copied), ms in price.items()},
        "arms": {
            arm: _row(pooled[arm])
            | {"priced_tok_s": 1000 * pooled[arm].num_emitted_tokens / float(priced[arm].sum())}
            | {
                f"{kind}_over_{name}": known(ratio_interval(of[other], of[arm]))
                for kind, of in (("measured", times), ("priced", priced))
                for name, other in held_to.items()
                if other in times
            }
            for arm in rounds
        },
    }


def _kind(record: RoundRecord) -> tuple[int, int]:
    """What decides how long a round takes: tokens that a model drafted, and copied ones."""
    return record.num_drafted - record.num_copied, record.num_copied


def prices(rounds: Rounds) -> dict[tuple[int, int], float]:
    """Median milliseconds, the policy's aside, of a round with so many drafts and so many copies.

    Taking turns leaves what the machine does within a turn: arms that chose alike have differed by
    a quarter beside other work. At equal prices they differ by what they chose and by their own
    policy's time alone.
    """
    times: dict[tuple[int, int], list[float]] = {}
    for texts in rounds.values():
        for record in (r for of in texts.values() for r in of):
            ms = record.total_ms - record.policy_ms
            if not record.num_drafted:  # a draft that read what it had missed, for its overlap
                ms -= record.draft_ms
            times.setdefault(_kind(record), []).append(ms)
    return {kind: median(values) for kind, values in sorted(times.items())}


def _row(summary: Summary) -> dict[str, Any]:
    total = summary.total_ms
    return {
        "tok_s": summary.tok_s,
        "acceptance_length": summary.mean_acceptance_length,
        "drafted": summary.num_draft_tokens / summary.num_spec_steps,
        "draft_share": summary.draft_ms / total,
        "verify_share": summary.verify_ms / total,
        "policy_share": summary.policy_ms / total,
        "policy_ms": summary.policy_ms / summary.num_spec_steps,
        "flips": summary.path_mismatch_rate,
        "tokens": summary.num_emitted_tokens,
    }


def _show(compression: str, regime: Mapping[str, Any]) -> None:
    tokens = next(iter(regime["arms"].values()))["tokens"]
    best = regime["best_fixed"]
    table = Table(
        title=f"{compression}: {tokens} tokens an arm; ratios of tokens per second, the last three "
        "at equal prices of a round"
    )
    columns = ("arm", "tok/s", "priced", "AL", "drafted", "draft", "verify", "policy", "flips",
               f"/ {best}", f"/ {best}", "/ oracle", "/ ours")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in sorted(regime["arms"].items(), key=lambda item: -item[1]["priced_tok_s"]):
        table.add_row(
            name, f"{row['tok_s']:.1f}", f"{row['priced_tok_s']:.1f}",
            f"{row['acceptance_length']:.3f}", f"{row['drafted']:.2f}",
            f"{row['draft_share']:.2f}", f"{row['verify_share']:.2f}", f"{row['policy_ms']:.2f} ms",
            f"{row['flips']:.4f}",
            *(spread(row[ratio]) if ratio in row else "-" for ratio in RATIOS),
        )  # fmt: skip
    Console(width=190).print(table)
