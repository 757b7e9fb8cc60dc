"""Counts to ratios, each defined once.

Acceptance length always counts the bonus token: mean_acceptance_length = 1 + accepted / rounds,
vLLM's definition. `None` stands for what was not measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tts.records import RoundRecord

WINDOW = 1000  # tokens that distinct-4 is taken of
LOOP = 0.3  # distinct 4-grams per 4-gram below this, in a window of 1,000 tokens: a loop


def mean_acceptance_length(rounds: Sequence[RoundRecord]) -> float | None:
    """1 + accepted drafts / rounds, bonus counted."""
    if not rounds:
        return None
    return 1 + sum(r.num_accepted for r in rounds) / len(rounds)


def draft_acceptance_rate(rounds: Sequence[RoundRecord]) -> float | None:
    """Accepted drafts / drafted tokens."""
    drafted = sum(r.num_drafted for r in rounds)
    return sum(r.num_accepted for r in rounds) / drafted if drafted else None


def acceptance_rate_per_offset(rounds: Sequence[RoundRecord]) -> list[float]:
    """Accepted at offset i / rounds that proposed offset i."""
    longest = max((r.num_drafted for r in rounds), default=0)
    rates = []
    for offset in range(longest):
        proposed = [r for r in rounds if r.num_drafted > offset]
        rates.append(sum(r.num_accepted > offset for r in proposed) / len(proposed))
    return rates


def mean_overlap(rounds: Sequence[RoundRecord]) -> float | None:
    """Mean of sum_x min(p, q) over committed positions.

    It does not depend on gamma, unless the draft reads states of its own (EAGLE-3).
    """
    values = [value for r in rounds for value in r.overlap]
    return sum(values) / len(values) if values else None


def tokens_per_second(rounds: Sequence[RoundRecord]) -> float | None:
    """Emitted tokens / time of the rounds, prefill excluded, updates included."""
    seconds = sum(r.total_ms for r in rounds) / 1000
    return sum(r.num_emitted for r in rounds) / seconds if seconds else None


def distinct_4(tokens: Sequence[int]) -> float | None:
    """Distinct 4-grams / 4-grams."""
    total = len(tokens) - 3
    if total < 1:
        return None
    return len({tuple(tokens[i : i + 4]) for i in range(total)}) / total


def distinct_4_windows(tokens: Sequence[int], size: int = WINDOW) -> list[float]:
    """distinct-4 of each full window of ``size`` tokens; below `LOOP` the text repeats itself."""
    windows = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    return [value for window in windows if (value := distinct_4(window)) is not None]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a generation, or any set of rounds, amounts to; vLLM's names where it has one."""

    num_spec_steps: int
    num_draft_tokens: int
    num_copied_draft_tokens: int  # of those: made by no model
    num_accepted_draft_tokens: int
    num_emitted_tokens: int
    mean_acceptance_length: float | None  # bonus counted
    draft_acceptance_rate: float | None
    acceptance_rate_per_offset: list[float]
    acceptance_histogram: list[int]  # rounds by accepted drafts 0, 1, 2, ...
    mean_overlap: float | None
    num_overlap_positions: int
    tok_s: float | None
    draft_ms: float
    verify_ms: float
    policy_ms: float
    update_ms: float
    num_updates: int
    num_taken_back: int  # updates that the guard undid: restored or reset
    adapted_share: float | None  # of emitted tokens, drafted for by a draft that had learned
    prefill_ms: float
    total_ms: float
    path_mismatches: int
    path_mismatch_rate: float | None  # of emitted tokens: how often rows of a pass flip a choice


def summarise(rounds: Iterable[RoundRecord]) -> Summary:
    """Counts and ratios over ``rounds``."""
    rounds = list(rounds)
    longest = max((r.num_accepted for r in rounds), default=-1)
    updates = [r.update for r in rounds if r.update is not None]
    emitted = sum(r.num_emitted for r in rounds)
    mismatches = sum(r.mismatches for r in rounds)
    return Summary(
        num_spec_steps=len(rounds),
        num_draft_tokens=sum(r.num_drafted for r in rounds),
        num_copied_draft_tokens=sum(r.num_copied for r in rounds),
        num_accepted_draft_tokens=sum(r.num_accepted for r in rounds),
        num_emitted_tokens=emitted,
        mean_acceptance_length=mean_acceptance_length(rounds),
        draft_acceptance_rate=draft_acceptance_rate(rounds),
        acceptance_rate_per_offset=acceptance_rate_per_offset(rounds),
        acceptance_histogram=[sum(r.num_accepted == n for r in rounds) for n in range(longest + 1)],
        mean_overlap=mean_overlap(rounds),
        num_overlap_positions=sum(len(r.overlap) for r in rounds),
        tok_s=tokens_per_second(rounds),
        draft_ms=sum(r.draft_ms for r in rounds),
        verify_ms=sum(r.verify_ms for r in rounds),
        policy_ms=sum(r.policy_ms for r in rounds),
        update_ms=sum(u.update_ms for u in updates),
        num_updates=len(updates),
        num_taken_back=sum(u.event in ("restored", "reset") for u in updates),
        adapted_share=sum(r.num_emitted for r in rounds if r.adapted) / emitted
        if emitted
        else None,
        prefill_ms=sum(r.prefill_ms for r in rounds),
        total_ms=sum(r.total_ms for r in rounds),
        path_mismatches=mismatches,
        path_mismatch_rate=mismatches / emitted if emitted else None,
    )
