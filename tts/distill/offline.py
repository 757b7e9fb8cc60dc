"""Train a draft before it ships: from text that its target wrote, for the overlap it decodes with.

Teacher probabilities are recomputed from cached hidden states with the frozen head; the target
itself is not needed. Runs on CPU and GPU, in bfloat16 with float32 master weights, and goes on
where it was stopped.
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
from tts.drafting import reduced
from tts.errors import UserError

# logit rows held at a time: on a CPU few enough that the allocator reuses the same pages
ROWS = {"cpu": 384, "cuda": 8192}
GAMMA = 4  # acceptance length is reported at this speculation length


@dataclass(frozen=True)
class OfflineConfig:
    """What is trained, on what, for how long.

    Args:
        layers: layers of the target that the draft's start as copies of.
        draft_vocab_size: how many of the most frequent generated ids the draft predicts.
        loss: one of `tts.distill.losses.LOSSES`.
        warm_share: share of the steps that run on forward KL first.
        temperature: at which p and q are compared: that of decoding.
        batch_size: sequences a step.
        visits: tokens to train on, repetitions counted.
        learning_rate: peak of a cosine schedule with ``warmup`` steps.
        weight_decay: of AdamW.
        clip: maximal gradient norm.
        every: steps between evaluations and checkpoints.
        seed: of the order of the sequences.
    """

    layers: tuple[int, ...] = (0, 29)
    draft_vocab_size: int = 16384
    loss: str = "overlap"
    warm_share: float = 0.5
    temperature: float = 0.8
    batch_size: int = 64
    visits: int = 2_000_000
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss: {self.loss!r} is not one of {', '.join(LOSSES)}")
        for name in ("draft_vocab_size", "batch_size", "visits", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive: use at least 1")
        for name in ("temperature", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        if not 0 <= self.warm_share <= 1:
            raise UserError(f"warm_share: {self.warm_share} is outside [0, 1]")


@dataclass(frozen=True, slots=True)
class Report:
    """One evaluation on held-out sequences."""

    step: int
    visits: int
    loss: float  # mean training loss since the last report
    overlap: float  # sum of min(p, q) at the temperature, mean over counted rows
    overlap_by_quarter: list[float]  # by position in the sequence
    acceptance_length: float  # 1 + sum of prefix products of overlap over the next GAMMA rows
    elapsed_s: float


def frequent_ids(corpus: Corpus, size: int, always: list[int]) -> torch.Tensor:
    """The ``size`` most frequent generated ids, those in ``always`` included, ascending."""
    counts = torch.bincount(corpus.tokens[:, 1:][corpus.counts].long())
    counts[always] = counts.max() + 1
    best = counts.argsort(descending=True, stable=True)[:size]
    return best[counts[best] > 0].sort().values


class OfflineTrainer:
    """Trains ``draft`` on ``corpus``; state lives in ``folder`` and is resumed from there.

    The corpus may have grown when training is resumed, and the draft's vocabulary changed: neither
    is part of what is trained.
    """

    def __init__(
        self,
        draft: reduced.ReducedLlamaForCausalLM,
        corpus: Corpus,
        held_out: Corpus,
        config: OfflineConfig,
        folder: Path,
    ) -> None:
        # the head rows stay in the target's dtype, as the teacher's are
        self._head = draft.lm_head.weight.detach().clone()
        self.draft, self.config, self.folder = draft.float().train(), config, folder
        self._corpus, self._held_out = corpus, held_out
        self._parameters = [
            parameter
            for name, parameter in draft.named_parameters()
            if name not in ("model.embed_tokens.weight", "lm_head.weight")
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._parameters, config.learning_rate, (0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step = 0
        self._seconds = 0.0
        self.tokens_per_step = config.batch_size * corpus.tokens.shape[1]
        self.steps = max(1, config.visits // self.tokens_per_step)
        if self._checkpoint.is_file():
            self._resume()

    def run(self, on_step: Callable[[], object] = lambda: None) -> Iterator[Report]:
        """Train to the end, yielding an evaluation every ``every`` steps and after the last."""
        losses: list[torch.Tensor] = []
        while self.step < self.steps:
            began = time.perf_counter()
            losses.append(self._update(self._batch(self.step)))
            self.step += 1
            on_step()
            self._seconds += time.perf_counter() - began
            if self.step % self.config.every == 0 or self.step == self.steps:
                report = self.evaluate(torch.stack(losses).mean().item())
                losses = []
                self._save()
                with (self.folder / "training.jsonl").open("a") as log:
                    log.write(json.dumps(asdict(report)) + "\n")
                yield report

    @torch.no_grad()
    def evaluate(self, loss: float = math.nan) -> Report:
        """Overlap and acceptance length on the held-out sequences."""
        corpus, everything = self._held_out, torch.arange(len(self._held_out))
        counts, shared = corpus.counts, torch.zeros(corpus.counts.shape)
        shared[counts] = torch.cat(
            [
                overlap(log_p, log_q).cpu()
                for batch in everything.split(self.config.batch_size)
                for log_p, log_q in self._compare(self._hidden(corpus, batch), corpus, batch)
            ]
        )
        quarters = [
            (s.sum() / c.sum()).item()
            for s, c in zip(shared.chunk(4, 1), counts.chunk(4, 1), strict=True)
        ]
        ahead, whole = shared.unfold(1, GAMMA, 1), counts.unfold(1, GAMMA, 1).all(-1)
        accepted = ahead.cumprod(-1).sum(-1)[whole]
        return Report(
            self.step,
            self.step * self.tokens_per_step,
            loss,
            shared[counts].mean().item(),
            quarters,
            1 + accepted.mean().item(),
            self._seconds,
        )

    def _batch(self, step: int) -> torch.Tensor:
        """Sequences of a step: every epoch is a seeded shuffle, so that a step is resumable."""
        size, total = self.config.batch_size, len(self._corpus)
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
        hidden = self._hidden(self._corpus, batch)
        # the head is frozen: its rows are walked through in chunks, gradients meet at its input
        leaf = hidden.detach().requires_grad_(True)
        total = torch.zeros((), device=hidden.device)
        for log_p, log_q in self._compare(leaf, self._corpus, batch):
            loss = loss_of(log_p, log_q).sum() / len(leaf)
            loss.backward()
            total += loss.detach()
        hidden.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self._parameters, config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def _hidden(self, corpus: Corpus, batch: torch.Tensor) -> torch.Tensor:
        """The draft's final hidden states of the counted rows of ``batch``, `[rows, hidden]`."""
        device = self.draft.device
        tokens = corpus.tokens[batch][:, :-1].to(device)
        counts = corpus.counts[batch].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return self.draft.model(input_ids=tokens).last_hidden_state[counts].float()

    def _compare(
        self, hidden: torch.Tensor, corpus: Corpus, batch: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(log p, log q) over the draft's ids, a few rows at a time; p's other mass is missing."""
        head, temperature = self._head, self.config.temperature
        rows = ROWS.get(head.device.type, ROWS["cuda"])
        teacher, log_mass = (x.to(head.device) for x in corpus.teacher(batch))
        for own, target, mass in zip(
            hidden.split(rows), teacher.split(rows), log_mass.split(rows), strict=True
        ):
            log_p = (target.to(head.dtype) @ head.T).float() / temperature - mass[:, None]
            log_q = ((own.to(head.dtype) @ head.T).float() / temperature).log_softmax(-1)
            yield log_p, log_q

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
        reduced.save(self.draft, self.folder)

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


def _cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear to 1 over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
