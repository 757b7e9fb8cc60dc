"""Decode prompts to the cap at every state, for `tts profile --records`."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from rich.progress import track

from controllers.plain import Plain
from controllers.speckv import step_signals
from experiments.decode import decode
from experiments.options import TextOptions
from experiments.steps import Step
from experiments.workload import Dialogue
from tts.drafting import Memory
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.models import ModelPair
from tts.policy import LengthPolicy, RoundOutcome, RoundState

TIMED, TIMED_TOKENS = 12, 72  # prompts on which every gamma takes its turn, for its time; of each


class Watched(Plain):
    """Drafts ``cap`` tokens in every round and keeps what each has taught."""

    def __init__(self, cap: int) -> None:
        super().__init__(cap)
        self.outcomes: list[RoundOutcome] = []

    def observe(self, outcome: RoundOutcome) -> None:
        if outcome.num_drafted == self.cap:  # the end of the text did not cut it short
            labels = partial(list, outcome.acceptance())  # the rows they come from are let go
            self.outcomes.append(replace(outcome, acceptance=labels))


class InTurn(Plain):
    """Drafts 0, 1, 1, 2, ..., cap tokens in turn and keeps the time of each.

    But not of the first after a round of none, in which the draft reads what it has missed.
    """

    def __init__(self, cap: int) -> None:
        super().__init__(cap)
        self._rounds = 0
        self._behind = False
        self.ms: list[list[float]] = [[] for _ in range(cap + 1)]

    def plan(self, state: RoundState) -> int:
        self._rounds += 1
        turn = self._rounds % (self.cap + 2)
        return min(turn if turn < 2 else turn - 1, state.limit)

    def observe(self, outcome: RoundOutcome) -> None:
        behind, self._behind = self._behind, not outcome.num_drafted
        if behind and outcome.num_drafted:
            return
        self.ms[outcome.num_drafted].append(outcome.draft_ms + outcome.verify_ms)


def collect(
    pair: ModelPair,
    prompts: list[Dialogue],
    text: TextOptions,
    cap: int,
    memory: Memory | None = None,
    window: int | None = None,
) -> Iterator[tuple[Step, torch.Tensor]]:
    """The steps of all ``prompts``, and the draft's states `[cap, width]` in each.

    Raises:
        UserError: if the texts are too short to time every gamma.
    """

    def follow(policy: LengthPolicy, prompt: Dialogue, text: TextOptions = text) -> None:
        decoder = SpeculativeDecoder(
            pair, policy=policy, acceptance="coupled", memory=memory, draft_window=window
        )
        decode(decoder, prompt, text)

    turns = InTurn(cap)
    timed = replace(text, max_new_tokens=min(TIMED_TOKENS, text.max_new_tokens))
    for prompt in prompts[:: max(1, len(prompts) // TIMED)]:
        follow(turns, prompt, timed)
    round_ms = [median(times) if times else math.nan for times in turns.ms]
    if math.isnan(sum(round_ms)):
        raise UserError(
            f"max_new_tokens: not every gamma up to {cap} was drafted in {text.max_new_tokens} "
            "tokens: use more, or a lower cap if this draft goes no further"
        )
    for prompt in track(prompts, pair.compression):
        watched = Watched(cap)
        follow(watched, prompt)
        for index, outcome in enumerate(watched.outcomes):
            step = _step(outcome, pair.compression, prompt.id, index, round_ms)
            yield step, torch.stack([s.hidden for s in outcome.signals if s.hidden is not None])


def _step(
    outcome: RoundOutcome, compression: str, prompt: str, index: int, round_ms: list[float]
) -> Step:
    drafted, accepted, state = outcome.num_drafted, outcome.num_accepted, outcome.state
    return Step(
        compression, drafted, prompt.rsplit("-", 1)[0], index,
        accepted, accepted / drafted, accepted + 1, *step_signals(outcome.signals),
        prompt, state.position, state.context_length,
        [s.entropy for s in outcome.signals],
        [s.confidence for s in outcome.signals],
        [s.probability for s in outcome.signals],
        outcome.acceptance(), outcome.draft_ms, outcome.verify_ms, round_ms,
    )  # fmt: skip
