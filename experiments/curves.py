"""Rounds to curves over the output position; one conversation is one sample, never one round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tts.metrics import mean_acceptance_length, tokens_per_second
from tts.records import RoundRecord

Rounds = Sequence[RoundRecord]
Array = NDArray[np.float64]
RESAMPLES = 2000
BIN = 250  # tokens that a point of a curve stands for


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity of one conversation by output position; `nan` where nothing was measured."""

    position: list[float]  # middle of each bin, tokens
    value: list[float]


def overlap_curve(rounds: Rounds, edges: Sequence[int]) -> Curve:
    """Mean overlap of the committed positions in each bin."""
    points = [
        (position, value)
        for r in rounds
        for position, value in zip(r.overlap_position, r.overlap, strict=True)
    ]
    return _binned(
        edges,
        lambda low, high: _mean([value for position, value in points if low <= position < high]),
    )


def acceptance_curve(rounds: Rounds, edges: Sequence[int]) -> Curve:
    """Mean acceptance length, bonus counted, of the rounds that begin in each bin."""
    return _binned(edges, lambda low, high: _or_nan(mean_acceptance_length(_in(rounds, low, high))))


def speed_curve(rounds: Rounds, edges: Sequence[int]) -> Curve:
    """Tokens per second of the rounds that begin in each bin."""
    return _binned(edges, lambda low, high: _or_nan(tokens_per_second(_in(rounds, low, high))))


def gamma_curve(rounds: Rounds, edges: Sequence[int]) -> Curve:
    """Mean number of drafted tokens of the rounds that begin in each bin."""
    return _binned(
        edges,
        lambda low, high: _mean([float(r.num_drafted) for r in _in(rounds, low, high)]),
    )


def seconds_curve(rounds: Rounds, edges: Sequence[int]) -> Curve:
    """Seconds since the first round, at the end of each bin; prefill excluded."""
    end = length(rounds)
    return _binned(
        edges,
        lambda low, high: (
            sum(r.total_ms for r in rounds if r.position < high) / 1000
            if low < end
            else float("nan")
        ),
    )


def ahead_from(static: Rounds, rounds: Rounds, edges: Sequence[int]) -> int | None:
    """Output position from which on ``rounds`` have cost less time than ``static``, to the end."""
    pairs = zip(seconds_curve(static, edges).value, seconds_curve(rounds, edges).value, strict=True)
    ahead = None
    for (_, high), (before, now) in zip(pairwise(edges), pairs, strict=True):
        if now > before:
            ahead = None
        elif ahead is None and now < before:
            ahead = min(high, length(rounds))
    return ahead


CURVES = {
    "overlap": overlap_curve,
    "acceptance_length": acceptance_curve,
    "tok_s": speed_curve,
    "gamma": gamma_curve,
    "seconds": seconds_curve,
}


def bin_edges(end: int, width: int) -> list[int]:
    """0, width, 2 * width, ... up to at least ``end``."""
    return list(range(0, end + width, width))


def length(rounds: Rounds) -> int:
    """Generated tokens at the end of the last round."""
    return rounds[-1].position + rounds[-1].num_emitted


def by_third(rounds: Rounds, curve: Callable[[Rounds, Sequence[int]], Curve]) -> list[float]:
    """``curve`` in each third of the output."""
    return curve(rounds, third_edges(length(rounds))).value


def third_edges(end: int) -> list[int]:
    """The borders of the thirds of an output of ``end`` tokens."""
    return [round(end * i / 3) for i in range(4)]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of what was measured, see `bootstrap`; nan if nothing was."""
    measured = np.array([v for v in values if not np.isnan(v)])
    if len(measured) == 0:
        return np.nan, np.nan, np.nan
    return bootstrap(measured, lambda drawn: drawn.mean(-1))


def ratio_interval(above: Array, below: Array) -> tuple[float, float, float]:
    """(sum of ``above`` / sum of ``below``, low, high), paired by unit; see `bootstrap`."""
    return bootstrap(np.stack([above, below]), lambda drawn: drawn[0].sum(-1) / drawn[1].sum(-1))


def quotient(value: float, base: float) -> float:
    """value / base; nan where the base is nothing."""
    return value / base if base else np.nan


def worst(values: Sequence[float]) -> float:
    """The least of what was measured; nan if nothing was."""
    return min((value for value in values if not np.isnan(value)), default=np.nan)


def bootstrap(units: Array, statistic: Callable[[Array], Array]) -> tuple[float, float, float]:
    """(value, low, high): 95 % bootstrap over units `[..., n]`: conversations, or prompts.

    With one unit there is no interval: low and high are nan.

    Args:
        units: what was measured on each.
        statistic: of units `[..., n]` and, at once, of resampled ones `[..., resamples, n]`.
    """
    count, value = units.shape[-1], float(statistic(units))
    if count == 1:
        return value, np.nan, np.nan
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(statistic(units[..., draws]), [2.5, 97.5])
    return value, float(low), float(high)


def known(values: Sequence[float]) -> list[float | None]:
    """What was not measured is None, as JSON has it."""
    return [None if np.isnan(value) else value for value in values]


def _binned(edges: Sequence[int], measure: Callable[[int, int], float]) -> Curve:
    bins = list(pairwise(edges))
    return Curve([(a + b) / 2 for a, b in bins], [measure(a, b) for a, b in bins])


def _in(rounds: Rounds, low: int, high: int) -> list[RoundRecord]:
    return [r for r in rounds if low <= r.position < high]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
