"""Alternates decoding rounds with small gradient steps, and watches whether they pay.

After every round the coordinator takes in what the target said. When enough is new and the share of
wall time allows it, it first lets the bare draft and the adapted one compete on the positions that
came after the last step (the guard), then takes the next step and rewrites the live weights.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tts.cached_model import CachedModel
from tts.distill.config import DistillConfig
from tts.distill.evidence import Evidence, Rows
from tts.distill.learner import Learner, Window
from tts.drafting.pard import mask_token
from tts.drafting.protocol import TrainableDrafter
from tts.errors import UserError
from tts.records import UpdateRecord

SMOOTHING = 0.85  # of the gain, an update's weight among those before
WARM = 4  # updates before the guard judges
TOLERANCE = 0.005  # overlap that the adapter may lose against the bare draft
WORTHWHILE = 0.005  # overlap gained below which updates become rarer
RARER = 2  # times the stride, then
FIRST_MS = 100.0  # what an update is taken to cost before one was measured
IDLE_SHARE = 0.25  # of the allowed time, where no tokens are drafted


@dataclass(slots=True)
class Lesson:
    """What is known about one sequence."""

    evidence: Evidence
    bare: CachedModel  # the bare draft on its own keys, the guard's yardstick
    learned: int = 0  # absolute position up to which evidence was used


class Coordinator:
    """Owns the learner and decides when it steps.

    Args:
        draft: the user's draft; stays bit-identical.
        head: weight of the target's language-model head `[vocab, hidden]`.
        config: how to learn.

    Raises:
        UserError: if the draft is of PARD, has recurrent layers, or none that the config targets.
    """

    def __init__(self, draft: PreTrainedModel, head: torch.Tensor, config: DistillConfig) -> None:
        if mask_token(draft) is not None:
            raise UserError(
                "distill: a PARD draft cannot learn yet, its mask rows have no replay: switch the "
                "draft's updates off"
            )
        if CachedModel(draft).cache.is_recurrent:
            raise UserError(
                "distill: the draft has recurrent layers, whose past states are not kept: use a "
                "draft with attention only"
            )
        self.config = config
        self.learner = Learner(draft, head, config)
        self._draft = draft
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

    def lesson(self, draft_window: int | None = None) -> Lesson:
        """A sequence begins; under scope ``sequence`` everything learned before is dropped."""
        if self.config.scope == "sequence" and self.learner.adapter.version:
            self.learner.reset()
            self.learner.adapter.write()
            self._forget()
        return Lesson(Evidence(self.config.capacity), CachedModel(self._draft, draft_window))

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
        drafter: TrainableDrafter,
        temperature: float,
    ) -> UpdateRecord | None:
        """Judge and learn if it is time to; the draft must not change otherwise.

        Args:
            lesson: of the sequence.
            sequence: all committed tokens.
            settled: positions before this one were drafted, and measured, with the draft as it is.
            drafter: that drafts for the sequence with `live`.
            temperature: at which p and q are compared.
        """
        if lesson.evidence.since(lesson.learned) < self.config.stride * self._patience:
            return None
        share = self.config.max_update_share
        allowed_ms = share * max(IDLE_SHARE, self._drafting) * self._wall_ms
        if share < 1 and self._spent_ms + self._expected_ms > allowed_ms:
            return None
        began = time.perf_counter()
        rows = lesson.evidence.window(self.config.window, settled)
        if rows is None or rows.end <= lesson.learned:
            return None
        record = self._step(lesson, sequence, rows, drafter, temperature)
        lesson.learned = rows.end
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
        rows: Rows,
        drafter: TrainableDrafter,
        temperature: float,
    ) -> UpdateRecord:
        learner, config = self.learner, self.config

        def window(rows: Rows) -> Window:
            start, end = rows.first - 1, rows.end - 1
            prefix = drafter.keys_values(start)
            return Window(rows, sequence[start:end], prefix, lesson.bare.cache.window)

        compared = config.guard or config.proximal > 0
        # rows that an earlier step has seen say nothing about what it taught
        fresh = max(rows.first, lesson.learned)
        bare = None
        if compared:
            if not learner.taught and not lesson.bare.length:
                drafter.lend(lesson.bare, fresh - 1)  # instead of reading the context once more
            bare = self._bare(lesson, sequence, fresh, rows.end, temperature)
        drawn = [
            lesson.evidence.draw(config.window, rows.first, learner.random)
            for _ in range(config.replay)
        ]
        windows = [window(rows), *(window(old) for old in drawn if old is not None)]
        step = learner.step(windows, temperature, bare)
        event = "skipped" if step.skipped else None
        gain = None
        if config.guard and step.bare_overlap is not None:
            gain = float((step.overlap[fresh - rows.first :] - step.bare_overlap).mean())
            event = self._judge(gain) or event
        learner.adapter.write()
        if config.keys == "recompute":
            drafter.recompute(sequence, config.window)
        return UpdateRecord(
            loss=step.loss,
            grad_norm=step.grad_norm,
            lost_mass=step.lost_mass,
            overlap=float(step.overlap.mean()),
            gain=gain,
            smoothed_gain=self._gain if config.guard else None,
            event=event,
            adapter_version=learner.adapter.version,
        )

    def _bare(
        self, lesson: Lesson, sequence: list[int], first: int, end: int, temperature: float
    ) -> torch.Tensor:
        """log q of the bare draft for positions ``first`` to ``end``, on keys of its own."""
        bare = lesson.bare
        bare.rollback(min(bare.length, first - 1))
        fed = bare.feed(sequence[bare.length : end - 1], keep=end - first)
        return self.learner.normalised(fed.logits, temperature)

    def _judge(self, gain: float) -> str | None:
        """Act on how the adapter did against the bare draft; returns what was done."""
        self._gain += (gain - self._gain) * max(1 - SMOOTHING, 1 / (1 + self._updates))
        self._patience = 1
        if self._updates < WARM:
            return None
        learner = self.learner
        if self._gain >= TOLERANCE and self._gain >= self._best:
            self._best, self._good = self._gain, learner.adapter.snapshot()
        elif self._gain < -TOLERANCE:
            good = self._good
            learner.restart(good)
            self._forget()
            return "reset" if good is None else "restored"
        if self._gain < WORTHWHILE:
            self._patience = RARER
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
