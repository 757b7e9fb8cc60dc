"""How each family of drafts is run over training text: which rows it predicts, from what.

A student turns sequences of a corpus into rows for the loss. A row predicts the token after a
counted position, ``depth`` tokens beyond what the draft was shown: an autoregressive draft has seen
everything (depth 0), a chain or a block has only its own steps after the root.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import DynamicCache

from tts.distill.text import Text
from tts.drafting import dflash_checkpoint, eagle3_checkpoint, reduced
from tts.drafting.dflash_model import DFlash
from tts.drafting.eagle3_model import Eagle3
from tts.drafting.pard import beside

KEPT = 0.7  # of the masks at a depth that have one behind them (PARD's conditional drop)


class Predictions(NamedTuple):
    """Rows for the loss, in any order."""

    hidden: torch.Tensor  # [N, hidden] input of the frozen head, with its graph
    position: torch.Tensor  # int64 [N] into the batch's counts, flattened
    depth: torch.Tensor  # int64 [N]


class Student(Protocol):
    """A draft in training; its embedding and head are the target's and stay."""

    model: Any
    depths: int  # different depths it predicts at

    def predict(self, text: Text, batch: torch.Tensor) -> Predictions:
        """All rows of the sequences ``batch`` whose position counts."""
        ...

    def save(self, folder: Path) -> None:
        """Write the draft as it stands, so that it can be loaded."""
        ...


class AutoregressiveStudent:
    """Every counted row, at depth 0."""

    depths = 1

    def __init__(self, model: reduced.ReducedLlamaForCausalLM) -> None:
        self.model = model

    def predict(self, text: Text, batch: torch.Tensor) -> Predictions:
        device = self.model.device
        tokens = text.corpus.tokens[batch][:, :-1].to(device)
        hidden = self.model.model(input_ids=tokens).last_hidden_state.flatten(0, 1)
        position = text.corpus.counts[batch].to(device).flatten().nonzero()[:, 0]
        return Predictions(hidden[position], position, torch.zeros_like(position))

    def save(self, folder: Path) -> None:
        reduced.save(self.model, folder)


class PardStudent:
    """Every counted row, and masks behind some of them, fewer the deeper (PARD, conditional drop).

    Args:
        model: its config has a ``pard_token``.
        depths: tokens that a root predicts: one from its own row, the others from masks.
        share: of the positions that have masks behind them in training; every fourth has all of
            them in evaluation.
    """

    def __init__(self, model: reduced.ReducedLlamaForCausalLM, depths: int, share: float) -> None:
        self.model, self.depths, self._share = model, depths, share

    def predict(self, text: Text, batch: torch.Tensor) -> Predictions:
        device = self.model.device
        tokens = text.corpus.tokens[batch][:, :-1].to(device)
        count = tokens.shape[1]
        if torch.is_grad_enabled():
            random = torch.Generator().manual_seed(int(batch.sum()))
            kept = torch.rand(self.depths - 1, count, generator=random) < KEPT
            kept[:1] = torch.rand(1, count, generator=random) < self._share
            kept = kept.cumprod(0).bool()  # a mask needs those before it
        else:
            kept = (torch.arange(count) % 4 == 0).expand(self.depths - 1, -1)
        ahead, behind = kept.nonzero().to(device).T
        ahead = ahead + 1
        inside = behind + ahead < count
        ahead, behind = ahead[inside], behind[inside]
        row, seen = beside(behind, ahead, count)
        masks = tokens.new_full((len(batch), len(behind)), self.model.config.pard_token)
        hidden = self.model.model(
            input_ids=torch.cat([tokens, masks], 1),
            attention_mask=seen[None, None],
            position_ids=row[None],
        ).last_hidden_state
        counted = text.corpus.counts[batch].to(device)[:, row]
        position = row + count * torch.arange(len(batch), device=device)[:, None]
        depth = torch.cat([ahead.new_zeros(count), ahead]).expand(len(batch), -1)
        return Predictions(hidden[counted], position[counted], depth[counted])

    def save(self, folder: Path) -> None:
        reduced.save(self.model, folder)


class Eagle3Student:
    """Every pair, and a chain of ``depths`` steps from some of them (training-time test).

    Args:
        model: the head.
        depths: steps of a chain.
        share: of the pairs that chains are drafted from in training; all are in evaluation.
    """

    def __init__(self, model: Eagle3, depths: int, share: float) -> None:
        self.model, self.depths, self._share = model, depths, share

    def predict(self, text: Text, batch: torch.Tensor) -> Predictions:
        device = self.model.device
        read = text.features(batch)[:, :-1].to(device)
        pairs = read.shape[1]
        tokens = text.corpus.tokens[batch][:, 1 : pairs + 1].to(device)
        counts = text.corpus.counts[batch].to(device)
        every = torch.arange(counts.numel(), device=device).view(counts.shape)
        roots = torch.arange(pairs)
        if torch.is_grad_enabled():
            random = torch.Generator().manual_seed(int(batch.sum()))
            roots = roots[torch.rand(pairs, generator=random) < self._share]
        steps = self.model.unroll(tokens, read, self.depths, DynamicCache(), roots)
        hidden, position, depth = [], [], []
        for i, step in enumerate(steps):
            # pair t + i predicts what the target's row t + i + 1 predicts
            rows = (roots if i else torch.arange(pairs))[: step.shape[1]] + i + 1
            counted = counts[:, rows]
            hidden.append(self.model.norm(step)[counted])
            position.append(every[:, rows][counted])
            depth.append(torch.full_like(position[-1], i))
        return Predictions(torch.cat(hidden), torch.cat(position), torch.cat(depth))

    def save(self, folder: Path) -> None:
        eagle3_checkpoint.save(self.model, folder)


class DFlashStudent:
    """Blocks from random anchors, each conditioned on the context before it.

    Args:
        model: the drafter.
        share: of the positions that blocks are drafted from in training; every fourth is in
            evaluation.
    """

    def __init__(self, model: DFlash, share: float) -> None:
        self.model, self.depths, self._share = model, model.config.block_size - 1, share

    def predict(self, text: Text, batch: torch.Tensor) -> Predictions:
        device, size = self.model.device, self.depths + 1
        read = text.features(batch).to(device)
        rows = read.shape[1]
        tokens = text.corpus.tokens[batch][:, :rows].to(device)
        counts = text.corpus.counts[batch].to(device)
        if torch.is_grad_enabled():
            random = torch.Generator().manual_seed(int(batch.sum()))
            # an anchor's first prediction counts, so that none is spent on padding or prompts
            noise = torch.rand(len(batch), rows, generator=random).to(device)
            noise = noise.masked_fill(~counts[:, :rows], -1.0)
            anchors = noise.topk(int(self._share * rows), 1).indices.sort(1).values
        else:
            anchors = torch.arange(0, rows, 4, device=device).expand(len(batch), -1)
        hidden = self.model.unroll(tokens.gather(1, anchors), anchors, read, DynamicCache())[
            :, :, 1:
        ]
        depth = torch.arange(size - 1, device=device)
        # slot k of the block at s predicts x_{s+k}, as the target's row s + k - 1 does
        row = anchors[..., None] + depth
        inside = row < counts.shape[1]
        position = (
            row.clamp(max=counts.shape[1] - 1)
            + torch.arange(len(batch), device=device)[:, None, None] * counts.shape[1]
        )
        counted = inside & counts.flatten()[position]
        return Predictions(hidden[counted], position[counted], depth.expand(row.shape)[counted])

    def save(self, folder: Path) -> None:
        dflash_checkpoint.save(self.model, folder)
