"""What policies would have done at recorded states, and how well predictions hold there."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.curves import Array, bootstrap
from experiments.steps import Step
from tts.policy import LengthPolicy, RoundOutcome

BINS = 10

Lengths = Callable[[Step, torch.Tensor], int]  # tokens drafted at a state


def follow(policy: LengthPolicy) -> Lengths:
    """Drafts as ``policy`` says and lets it learn from what came of it.

    States are the recorder's: a shorter draft does not change the next state, so this compares
    choices state by state; only a real run tells what a policy gains.
    """

    def length(step: Step, hidden: torch.Tensor) -> int:
        if step.step == 0:
            policy.reset()
        planned, drafted = min(policy.plan(step.state), step.gamma), 0
        signals = step.signals(hidden)
        while drafted < planned:
            drafted += 1
            if drafted == planned or not policy.proceed(step.state, signals[drafted - 1]):
                break
        known = step.acceptance[:drafted]
        alone, here = step.round_ms[0], step.round_ms[drafted]
        policy.observe(
            RoundOutcome(
                step.state,
                min(step.accepted, drafted),
                signals[:drafted],
                partial(list, known),
                draft_ms=here - alone,
                verify_ms=alone,
            )
        )
        return drafted

    return length


def fixed(gamma: int) -> Lengths:
    """The same length everywhere."""
    return lambda step, hidden: gamma


def oracle(step: Step, hidden: torch.Tensor) -> int:
    """Stops at the first rejected token."""
    return min(step.accepted + 1, step.gamma)


def replay(lengths: Lengths, steps: Sequence[Step], hidden: torch.Tensor) -> Array:
    """Tokens and milliseconds of each step `[steps, 2]`, at the recorded median times."""
    rows = []
    for step, states in zip(steps, hidden, strict=True):
        drafted = lengths(step, states)
        rows.append((min(step.accepted, drafted) + 1, step.round_ms[drafted]))
    return np.array(rows, dtype=np.float64)


def tok_s(rows: Array) -> float:
    """Tokens per second of ``rows`` of `replay`."""
    return float(1000 * rows[:, 0].sum() / rows[:, 1].sum())


def over(rows: Array, base: Array, prompts: NDArray[np.str_]) -> tuple[float, float, float]:
    """(ratio, low, high) of tokens per second over ``base``, prompts resampled."""
    units = [[*rows[prompts == n].sum(0), *base[prompts == n].sum(0)] for n in np.unique(prompts)]

    def ratio(drawn: Array) -> Array:
        tokens, ms, base_tokens, base_ms = drawn.sum(-1)
        return np.asarray(tokens / ms / (base_tokens / base_ms))

    return bootstrap(np.array(units).T, ratio)


def reliability(predicted: Array, observed: Array) -> dict[str, object]:
    """Mean prediction and outcome by decile of the prediction; their mean distance; correlation."""
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    curve = [(float(predicted[p].mean()), float(observed[p].mean()), len(p)) for p in parts]
    error = sum(n * abs(said - seen) for said, seen, n in curve) / len(predicted)
    constant = predicted.std() == 0 or observed.std() == 0
    return {
        "correlation": None if constant else float(np.corrcoef(predicted, observed)[0, 1]),
        "calibration_error": float(error),
        "curve": curve,
    }
