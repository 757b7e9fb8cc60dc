"""Train a draft before it ships: from text that its target wrote, for the overlap it decodes with.

Teacher probabilities come from the target's final hidden states and its frozen head. Runs on CPU
and GPU, in bfloat16 with float32 master weights, and goes on where it was stopped.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tts.distill.corpus import Corpus
from tts.distill.losses import LOSSES, overlap
from tts.distill.students import Predictions, Student
from tts.distill.text import Text
from tts.errors import UserError

# logit rows held at a time: on a CPU few enough that the allocator reuses the same pages
ROWS = {"cpu": 384, "cuda": 8192}
GAMMA = 4  # acceptance length is reported at this speculation length
LENT = ("embed_tokens.weight", "lm_head.weight")  # the target's, never trained


@dataclass(frozen=True)
class OfflineConfig:
    """What is trained, on what, for how long.

    Args:
        layers: layers of the target that the draft's start as copies of.
        features: hidden states of the target that a head reads (none: three, spread as in DFlash).
        neurons: of DFlash: how many of each copied MLP, those that do most (0: all).
        draft_vocab_size: how many of the most frequent generated ids the draft predicts.
        loss: one of `tts.distill.losses.LOSSES`.
        warm_share: share of the steps that run on forward KL first.
        depth: not of an autoregressive draft: tokens it predicts from one root.
        mask_token_id: of PARD and DFlash: an id that text never holds, for tokens not known.
        root_share: not of an autoregressive draft: share of the positions that are such roots.
        decay: weight of a row at depth i is decay^i.
        temperature: at which p and q are compared: that of decoding.
        batch_size: sequences a step.
        visits: tokens to train on, repetitions counted.
        seconds: train for so long instead, whatever ``visits`` says: for a machine that is lent
            (0: visits decide).
        learning_rate: peak of a cosine schedule with ``warmup`` steps.
        weight_decay: of AdamW.
        clip: maximal gradient norm.
        every: steps between evaluations and checkpoints.
        seed: of what a draft begins as, and of the order of the sequences.
    """

    layers: tuple[int, ...] = (0, 29)
    features: tuple[int, ...] = ()
    neurons: int = 0
    draft_vocab_size: int = 16384
    loss: str = "overlap"
    warm_share: float = 0.5
    depth: int = 4
    mask_token_id: int = 16
    root_share: float = 0.3
    decay: float = 0.8
    temperature: float = 0.8
    batch_size: int = 64
    visits: int = 2_000_000
    seconds: float = 0.0
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss: {self.loss!r} is not one of {', '.join(LOSSES)}")
        for name in ("draft_vocab_size", "batch_size", "visits", "every", "depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive: use at least 1")
        for name in ("temperature", "learning_rate", "clip", "decay"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        if not self.seconds >= 0:
            raise UserError(f"seconds: {self.seconds} is negative: use 0 to let visits decide")
        if self.neurons < 0:
            raise UserError(f"neurons: {self.neurons} is negative: use 0 for all of the target's")
        if not 0 <= self.warm_share <= 1:
            raise UserError(f"warm_share: {self.warm_share} is outside [0, 1]")


@dataclass(frozen=True, slots=True)
class Report:
    """One evaluation on held-out sequences."""

    step: int
    visits: int
    loss: float | None  # mean training loss since the last report
    overlap: float  # sum of min(p, q) at the temperature, mean over counted rows
    overlap_by_quarter: list[float]  # by position in the sequence
    acceptance_length: float  # 1 + sum of prefix products of overlap over the next rows, at GAMMA
    elapsed_s: float


def frequent_ids(corpus: Corpus, size: int, always: list[int]) -> torch.Tensor:
    """The ``size`` most frequent generated ids, those in ``always`` included, ascending."""
    counts = torch.bincount(corpus.tokens[:, 1:][corpus.counts].long())
    counts[always] = counts.max() + 1
    best = counts.argsort(descending=True, stable=True)[:size]
    return best[counts[best] > 0].sort().values


class OfflineTrainer:
    """Trains ``student`` on ``text``; state lives in ``folder`` and is resumed from there.

    The corpus may have grown when training is resumed, and the draft's vocabulary changed: neither
    is part of what is trained.
    """

    def __init__(
        self, student: Student, text: Text, held_out: Text, config: OfflineConfig, folder: Path
    ) -> None:
        draft = student.model
        # the head rows stay in the target's dtype, as the teacher's are
        self._head = draft.lm_head.weight.detach().clone()
        draft.float().train()
        self.student, self.config, self.folder = student, config, folder
        self._text, self._held_out = text, held_out
        self._parameters = [
            parameter for name, parameter in draft.named_parameters() if not name.endswith(LENT)
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            config.learning_rate,
            (0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=self._head.is_cuda,
        )
        self.step = 0
        self._seconds = 0.0
        self.tokens_per_step = config.batch_size * text.corpus.tokens.shape[1]
        if self._checkpoint.is_file():
            self._resume()

    @property
    def steps(self) -> int:
        """Of the whole training; where the clock decides, as many as the pace so far gives."""
        if not self.config.seconds:
            return max(1, self.config.visits // self.tokens_per_step)
        if self._seconds >= self.config.seconds:
            return self.step
        return self.step + max(
            1, int(self.step * (self.config.seconds / max(self._seconds, 1e-3) - 1))
        )

    def run(self, on_step: Callable[[], object] = lambda: None) -> Iterator[Report]:
        """Train to the end, yielding an evaluation every ``every`` steps and after the last."""
        losses: list[torch.Tensor] = []
        while self.step < self.steps:
            began = time.perf_counter()
            losses.append(self._update(self._batch(self.step)))
            self.step += 1
            on_step()
            self._seconds += time.perf_counter() - began
            if self.step % self.config.every == 0 or self.step >= self.steps:
                report = self.evaluate(torch.stack(losses).mean().item())
                losses = []
                self._save()
                with (self.folder / "training.jsonl").open("a") as log:
                    log.write(json.dumps(asdict(report)) + "\n")
                yield report

    @torch.no_grad()
    def evaluate(self, loss: float | None = None) -> Report:
        """Overlap and acceptance length on the held-out sequences."""
        corpus, everything = self._held_out.corpus, torch.arange(len(self._held_out.corpus))
        counts = corpus.counts
        shared = torch.full((self.student.depths, *counts.shape), math.nan)
        for batch in everything.split(self.config.batch_size):
            rows = self._predict(self._held_out, batch)
            values = [
                overlap(p, q).cpu()
                for p, q in self._compare(rows, rows.hidden, self._held_out, batch)
            ]
            grid = torch.full((self.student.depths, len(batch) * counts.shape[1]), math.nan)
            grid[rows.depth.cpu(), rows.position.cpu()] = torch.cat(values)
            shared[:, batch] = grid.view(-1, len(batch), counts.shape[1])
        first = shared[0]
        quarters = [part[~part.isnan()].mean().item() for part in first.chunk(4, 1)]
        return Report(
            self.step,
            self.step * self.tokens_per_step,
            loss,
            first[~first.isnan()].mean().item(),
            quarters,
            _acceptance_length(shared),
            self._seconds,
        )

    def _batch(self, step: int) -> torch.Tensor:
        """Sequences of a step: every epoch is a seeded shuffle, so that a step is resumable."""
        size, total = self.config.batch_size, len(self._text.corpus)
        wanted = torch.arange(step * size, (step + 1) * size)
        batch = torch.empty_like(wanted)
        for epoch in (wanted // total).unique():
            random = torch.Generator().manual_seed(self.config.seed + int(epoch))
            here = wanted // total == epoch
            batch[here] = torch.randperm(total, generator=random)[wanted[here] % total]
        return batch

    def _update(self, batch: torch.Tensor) -> torch.Tensor:
        config = self.config
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * _cosine(self.step, self.steps, config.warmup)
        warm = self.step < config.warm_share * self.steps
        loss_of = LOSSES["forward_kl" if warm else config.loss]
        rows = self._predict(self._text, batch)
        weight = config.decay**rows.depth
        weight = weight / weight.sum()
        # the head is frozen: its rows are walked through in chunks, gradients meet at its input
        leaf = rows.hidden.detach().requires_grad_(True)
        total = torch.zeros((), device=leaf.device)
        pairs = self._compare(rows, leaf, self._text, batch)
        for (log_p, log_q), part in zip(pairs, weight.split(self._rows), strict=True):
            loss = loss_of(log_p, log_q) @ part
            loss.backward()
            total += loss.detach()
        rows.hidden.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self._parameters, config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def _predict(self, text: Text, batch: torch.Tensor) -> Predictions:
        with torch.autocast(self._head.device.type, torch.bfloat16):
            rows = self.student.predict(text, batch)
        return rows._replace(hidden=rows.hidden.float())

    def _compare(
        self, rows: Predictions, hidden: torch.Tensor, text: Text, batch: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(log p, log q) over the draft's ids, a few rows at a time; p's other mass is missing."""
        head, temperature = self._head, self.config.temperature
        teacher, log_mass = (x.to(head.device) for x in text.teacher(batch))
        counted = text.corpus.counts[batch].flatten().to(head.device)
        index = (counted.cumsum(0) - 1)[rows.position]  # of the teacher's row
        for own, at in zip(hidden.split(self._rows), index.split(self._rows), strict=True):
            said = teacher[at].to(head.dtype) @ head.T
            log_p = torch.add(-log_mass[at, None], said, alpha=1 / temperature)
            drafted = (own / temperature).to(head.dtype) @ head.T
            yield log_p, drafted.log_softmax(-1, torch.float32)

    @property
    def _rows(self) -> int:
        return ROWS.get(self._head.device.type, ROWS["cuda"])

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _save(self) -> None:
        """Checkpoint atomically, and write the draft as it stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"step": torch.tensor(self.step), "seconds": torch.tensor(self._seconds)}
        for i, parameter in enumerate(self._parameters):
            tensors[f"{i}.value"] = parameter.detach()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{i}.{key}"] = value
        partial = self._checkpoint.with_suffix(".partial")
        save_file({k: v.cpu() for k, v in tensors.items()}, partial)
        partial.rename(self._checkpoint)
        self.student.save(self.folder)

    def _resume(self) -> None:
        tensors: dict[str, Any] = load_file(self._checkpoint)
        self.step, self._seconds = int(tensors["step"]), float(tensors["seconds"])
        for i, parameter in enumerate(self._parameters):
            value = tensors[f"{i}.value"]
            if value.shape != parameter.shape:
                raise UserError(
                    f"out: {self.folder} holds a checkpoint of another draft: choose a new folder"
                )
            parameter.data.copy_(value)
            self._optimizer.state[parameter] = {
                key: tensors[f"{i}.{key}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _acceptance_length(shared: torch.Tensor) -> float:
    """1 + expected drafts accepted at `GAMMA`, mean over roots whose block was all measured.

    A draft of fewer depths is judged at as many.

    Args:
        shared: overlap `[depths, sequences, positions]`, nan where nothing was predicted; a draft
            with a single depth is as good at every other.
    """
    if len(shared) == 1:
        shared = shared.expand(GAMMA, -1, -1)
    gamma = min(GAMMA, len(shared))
    ahead = shared.shape[2] - gamma + 1
    block = torch.stack([shared[i, :, i : i + ahead] for i in range(gamma)])
    accepted = block.cumprod(0).sum(0)
    return 1 + accepted[~accepted.isnan()].mean().item()


def _cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear to 1 over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
