"""Alternates decoding rounds with small gradient steps, and watches whether they pay.

After every round the coordinator takes in what the target said. When enough is new and the share of
wall time allows it, it first lets the bare draft and the adapted one compete on the positions that
came after the last step (the guard), then takes the next step and rewrites the live weights.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tts.distill.config import RAREST, DistillConfig
from tts.distill.learner import Learner
from tts.drafting import Draft, trainable
from tts.drafting.protocol import TrainableDrafter
from tts.evidence import Evidence, Rows
from tts.records import UpdateRecord

SMOOTHING = 0.85  # of the gain, an update's weight among those before
WARM = 4  # updates before the guard judges
TOLERANCE = 0.005  # overlap that the adapter may lose against the bare draft
WORTHWHILE = 0.005  # overlap gained below which updates become rarer
FIRST_MS = 100.0  # what an update is taken to cost before one was measured
IDLE_SHARE = 0.2  # of the allowed time, where no tokens are drafted


@dataclass(slots=True)
class Lesson:
    """What is known about one sequence."""

    drafter: TrainableDrafter  # that drafts for it with `Coordinator.live`
    evidence: Evidence
    learned: int = 0  # absolute position up to which evidence was used


class Coordinator:
    """Owns the learner and decides when it steps.

    Args:
        draft: the user's draft; stays bit-identical.
        head: weight of the target's language-model head `[vocab, hidden]`.
        config: how to learn.

    Raises:
        UserError: if the draft cannot learn, or has no layers that the config targets.
    """

    def __init__(self, draft: Draft, head: torch.Tensor, config: DistillConfig) -> None:
        self._draft, family = trainable(draft)
        self.config = config
        self.learner = Learner(self._draft, family, head, config)
        self._wall_ms = self._spent_ms = 0.0
        self._expected_ms = FIRST_MS  # of an update
        self._drafting = 1.0  # recent share of rounds that drafted
        self._forget()

    def _forget(self) -> None:
        """How the adapter did is of no account any more."""
        self._gain = self._best = 0.0  # smoothed overlap over the bare draft's
        self._good: dict[str, torch.Tensor] | None = None  # the adapter at its best
        self._updates = 0
        self._patience = 1  # strides between two updates

    @property
    def live(self) -> PreTrainedModel:
        """The model to draft with."""
        model: PreTrainedModel = self.learner.adapter.live
        return model

    @property
    def adapted(self) -> bool:
        """Whether the live draft differs from the bare one."""
        return self.learner.taught

    def lesson(self, drafter: TrainableDrafter) -> Lesson:
        """A sequence begins; under scope ``sequence`` everything learned before is dropped."""
        if self.config.scope == "sequence":
            self._wall_ms = self._spent_ms = 0.0
            if self.learner.adapter.version:
                self.learner.reset()
                self.learner.adapter.write()
                self._forget()
        return Lesson(drafter, Evidence(self.config.capacity))

    def observe(self, lesson: Lesson, rows: Rows, drafted: bool, round_ms: float) -> None:
        """Take in the on-path rows of a round and what the round cost."""
        lesson.evidence.add(rows)
        self._wall_ms += round_ms
        self._drafting += (drafted - self._drafting) / 32

    def update(
        self,
        lesson: Lesson,
        sequence: list[int],
        settled: int,
        temperature: float,
    ) -> UpdateRecord | None:
        """Judge and learn if it is time to; the draft must not change otherwise.

        Args:
            lesson: of the sequence.
            sequence: all committed tokens.
            settled: positions before this one were drafted, and measured, with the draft as it is.
            temperature: at which p and q are compared.
        """
        share = self.config.max_update_share
        allowed_ms = share * max(IDLE_SHARE, self._drafting) * self._wall_ms
        if share < 1 and self._spent_ms + self._expected_ms > allowed_ms:
            return None
        if settled <= lesson.learned:
            return None
        if lesson.evidence.since(lesson.learned) < self.config.stride * self._patience:
            return None
        began = time.perf_counter()
        least = lesson.drafter.least_rows
        found = lesson.evidence.windows(self.config.window, settled)
        parts = [rows for rows in found if len(rows) >= least]
        if not parts or parts[0].end <= lesson.learned:
            return None
        record = self._step(lesson, sequence, parts, temperature)
        lesson.learned = parts[0].end
        record.update_ms = 1000 * (time.perf_counter() - began)
        self._spent_ms += record.update_ms
        self._wall_ms += record.update_ms
        self._expected_ms += (record.update_ms - self._expected_ms) * (0.2 if self._updates else 1)
        self._updates += 1
        return record

    def _step(
        self,
        lesson: Lesson,
        sequence: list[int],
        parts: list[Rows],
        temperature: float,
    ) -> UpdateRecord:
        """Learn from the newest rows, ``parts`` of them where a prompt lies in between."""
        learner, config, drafter = self.learner, self.config, lesson.drafter
        newest = [drafter.window(sequence, rows) for rows in parts]
        # rows that an earlier step has seen say nothing about what it taught
        fresh = [max(rows.first, lesson.learned) for rows in parts if rows.end > lesson.learned]
        unseen = [*zip(newest, fresh, strict=False)]
        bare = []
        if config.guard or config.proximal > 0:
            bare = [  # in the order of the text, which it reads
                drafter.bare(self._draft, sequence, window, first, not learner.taught)
                for window, first in unseen[::-1]
            ][::-1]
        drawn = [
            lesson.evidence.draw(config.window, parts[-1].first, learner.random)
            for _ in range(config.replay)
        ]
        older = [
            drafter.window(sequence, old) for old in drawn if old and len(old) >= drafter.least_rows
        ]
        judged = learner.adapter.snapshot()  # the gain is that of the adapter before the step
        step = learner.step([*newest, *older], temperature, bare, fresh)
        gain = step.gain if config.guard else None
        taken_back = None if gain is None else self._judge(gain, judged)
        learner.adapter.write()
        if taken_back is not None:  # the keys of what is gone go with it
            drafter.recompute(sequence, len(sequence))
        elif config.keys == "recompute":
            drafter.recompute(sequence, config.window)
        return UpdateRecord(
            loss=step.loss,
            grad_norm=step.grad_norm,
            lost_mass=step.lost_mass,
            overlap=step.overlap,
            gain=gain,
            smoothed_gain=self._gain if config.guard else None,
            event=taken_back or ("skipped" if step.skipped else None),
            adapter_version=learner.adapter.version,
        )

    def _judge(self, gain: float, judged: dict[str, torch.Tensor]) -> str | None:
        """Act on how the adapter ``judged`` did against the bare draft; returns what was done."""
        self._gain += (gain - self._gain) * max(1 - SMOOTHING, 1 / (1 + self._updates))
        diverged = not math.isfinite(gain)
        if self._updates < WARM and not diverged:
            return None
        self._patience = min(2 * self._patience, RAREST) if self._gain < WORTHWHILE else 1
        learner = self.learner
        if self._gain >= TOLERANCE and self._gain >= self._best:
            self._best, self._good = self._gain, judged
        elif diverged or self._gain < -TOLERANCE:
            good = self._good
            learner.restart(good)
            self._forget()
            return "reset" if good is None else "restored"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `load_state_dict` needs to go on."""
        state: dict[str, Any] = self.learner.state_dict()
        state |= {f"good.{name}": value for name, value in (self._good or {}).items()}
        return state | {name: getattr(self, f"_{name}") for name in NUMBERS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, live weights included.

        Raises:
            UserError: if it belongs to another draft or rank.
        """
        self.learner.load_state_dict(state)
        good = {k.removeprefix("good."): v for k, v in state.items() if k.startswith("good.")}
        self._good = good or None
        for name in NUMBERS:
            setattr(self, f"_{name}", state[name])


NUMBERS = ("wall_ms", "spent_ms", "expected_ms", "drafting", "gain", "best", "updates", "patience")
