"""Train a draft before it ships: from text that its target wrote, for the overlap it decodes with.

The target's final hidden states of all counted rows are computed once and kept; teacher logits are
recomputed from them with the frozen head. Runs on CPU and GPU, in bfloat16 with float32 master
weights, and goes on where it was stopped.
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
from transformers import PreTrainedModel

from tts.distill.corpus import Corpus
from tts.distill.losses import LOSSES, overlap
from tts.drafting import reduced
from tts.errors import UserError

ROWS = 8192  # logit rows held at a time, of draft and target
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
        held_out: share of the sequences kept for evaluation.
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
    held_out: float = 0.02
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
        for name in ("warm_share", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is outside [0, 1)")


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
    generated = corpus.tokens[:, 1:][corpus.counts].long()
    counts = torch.bincount(generated)
    counts[always] = counts.max() + 1
    best = counts.argsort(descending=True, stable=True)[:size]
    return best[counts[best] > 0].sort().values


class Teacher:
    """The target's final hidden states of all counted rows, and what its head makes of them."""

    def __init__(
        self,
        target: PreTrainedModel,
        corpus: Corpus,
        temperature: float,
        progress: Callable[[float], None],
    ) -> None:
        self._temperature = temperature
        self._head = target.get_output_embeddings().weight.detach()
        first = corpus.counts.sum(1).cumsum(0)
        self._start = torch.cat([first.new_zeros(1), first])  # first row of each sequence
        rows, width = int(first[-1]), self._head.shape[1]
        self._hidden = torch.empty(rows, width, dtype=target.dtype, device=target.device)
        self._log_mass = torch.empty(rows, device=target.device)
        batch = max(1, ROWS // corpus.tokens.shape[1])
        with torch.inference_mode():
            for i in range(0, len(corpus), batch):
                part = corpus.select(slice(i, i + batch))
                output = target.base_model(input_ids=part.tokens[:, :-1].to(target.device))
                hidden = output.last_hidden_state[part.counts.to(target.device)]
                at = slice(int(self._start[i]), int(self._start[min(i + batch, len(corpus))]))
                self._hidden[at] = hidden
                logits = (hidden @ self._head.T).float() / temperature
                self._log_mass[at] = logits.logsumexp(-1)
                progress((i + len(part)) / len(corpus))

    def rows(self, sequences: torch.Tensor) -> torch.Tensor:
        """Indices of the counted rows of ``sequences``, in their order."""
        spans = [torch.arange(int(self._start[i]), int(self._start[i + 1])) for i in sequences]
        return torch.cat(spans).to(self._hidden.device)

    def log_p(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """log p of ``ids`` at ``rows``: `[rows, ids]` float32, the mass of other ids missing."""
        logits = self._hidden[rows] @ self._head[ids].T
        return logits.float() / self._temperature - self._log_mass[rows, None]


class OfflineTrainer:
    """Trains ``draft`` on ``corpus``; state lives in ``folder`` and is resumed from there."""

    def __init__(
        self,
        draft: reduced.ReducedLlamaForCausalLM,
        teacher: Teacher,
        corpus: Corpus,
        config: OfflineConfig,
        folder: Path,
    ) -> None:
        self.draft, self.config, self.folder = draft.float().train(), config, folder
        self._teacher, self._corpus = teacher, corpus
        cut = len(corpus) - max(1, round(config.held_out * len(corpus)))
        self._train, self._held_out = torch.arange(cut), torch.arange(cut, len(corpus))
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

    def run(self) -> Iterator[Report]:
        """Train to the end, yielding an evaluation every ``every`` steps and after the last."""
        losses: list[torch.Tensor] = []
        while self.step < self.steps:
            began = time.perf_counter()
            losses.append(self._update(self._batch(self.step)))
            self.step += 1
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
        counts = self._corpus.counts[self._held_out]
        shared = torch.zeros(counts.shape)
        shared[counts] = torch.cat(
            [
                overlap(log_p, log_q).cpu()
                for batch in self._held_out.split(self.config.batch_size)
                for log_p, log_q in self._compare(self._hidden(batch), batch)
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
        size, total = self.config.batch_size, len(self._train)
        wanted = torch.arange(step * size, (step + 1) * size)
        batch = torch.empty_like(wanted)
        for epoch in (wanted // total).unique():
            random = torch.Generator().manual_seed(self.config.seed + int(epoch))
            here = wanted // total == epoch
            batch[here] = torch.randperm(total, generator=random)[wanted[here] % total]
        return self._train[batch]

    def _update(self, batch: torch.Tensor) -> torch.Tensor:
        config = self.config
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * _cosine(self.step, self.steps, config.warmup)
        warm = self.step < config.warm_share * self.steps
        loss_of = LOSSES["forward_kl" if warm else config.loss]
        hidden = self._hidden(batch)
        # the head is frozen: its rows are walked through in chunks, gradients meet at its input
        leaf = hidden.detach().requires_grad_(True)
        total = torch.zeros((), device=hidden.device)
        for log_p, log_q in self._compare(leaf, batch):
            loss = loss_of(log_p, log_q).sum() / len(leaf)
            loss.backward()
            total += loss.detach()
        hidden.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self._parameters, config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def _hidden(self, batch: torch.Tensor) -> torch.Tensor:
        """The draft's final hidden states of the counted rows of ``batch``, `[rows, hidden]`."""
        device = self.draft.device
        tokens = self._corpus.tokens[batch][:, :-1].to(device)
        counts = self._corpus.counts[batch].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return self.draft.model(input_ids=tokens).last_hidden_state[counts].float()

    def _compare(
        self, hidden: torch.Tensor, batch: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(log p, log q) over the draft's ids, at most ``ROWS`` rows at a time."""
        ids, head = self.draft.draft_ids, self.draft.lm_head.weight
        for own, rows in zip(
            hidden.split(ROWS), self._teacher.rows(batch).split(ROWS), strict=True
        ):
            with torch.autocast(own.device.type, torch.bfloat16):
                logits = own @ head.T
            yield (
                self._teacher.log_p(rows, ids),
                (logits.float() / self.config.temperature).log_softmax(-1),
            )

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
