"""From logits to distributions.

One function warps the logits of target and draft alike, in transformers' order. Distributions are
kept as the ids that survived the truncation and their probabilities, a few dozen numbers on the
host.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tts.settings import Sampling

# when truncating, the ids above the first of these probabilities are sorted; nearly always all that
# survives is among them, else those above the next one are
FLOORS = (1e-4, 1e-6, -1.0)


class Distribution(NamedTuple):
    """Probabilities of a few ids; ids that are not listed have probability zero."""

    ids: NDArray[np.int64]  # [n], each once
    probs: NDArray[np.float32]  # [n], sums to one

    def of(self, token: int) -> float:
        """Probability of ``token``."""
        return float(self.probs[self.ids == token].sum())

    def over(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Probabilities of ``ids`` [m], `[m]`."""
        order = self.ids.argsort()
        place = order[np.searchsorted(self.ids, ids, sorter=order).clip(max=len(order) - 1)]
        return np.where(self.ids[place] == ids, self.probs[place], np.float32(0))


class Warper:
    """Logits to `Distribution`s, as transformers' processors and warpers would, in their order.

    Repetition penalty, minimal length, suppressed ids, temperature, top-k, top-p, min-p. Ids tied
    with the last one kept by top-k or top-p are kept too, so that the set does not depend on the
    order of a sort.

    Args:
        sampling: resolved settings.
        prompt_length: tokens before the first generated one.
        columns: token id of each logit column (None: column j is id j).
    """

    def __init__(
        self, sampling: Sampling, prompt_length: int, columns: torch.Tensor | None = None
    ) -> None:
        self._sampling = sampling
        self._prompt_length = prompt_length
        self._columns = columns
        self._ids: NDArray[np.int64] | None = None if columns is None else columns.cpu().numpy()
        self._column_of: dict[int, torch.Tensor] = {}  # of an id that is banned: none or one

    def __call__(self, logits: torch.Tensor, sequence: list[int], first: int) -> list[Distribution]:
        """Warp consecutive rows: row j follows the prefix ``sequence[:first + j]``.

        Args:
            logits: `[rows, columns]`.
            sequence: committed tokens and drafts.
            first: prefix length of row 0.
        """
        sampling = self._sampling
        scores = logits.float()
        if self._columns is None:
            self._columns = torch.arange(scores.shape[1], device=scores.device)
        scores = self._penalised(scores, self._columns, sequence, first)
        scores = self._suppressed(scores, self._columns, first)
        if sampling.temperature == 0:
            best = scores.argmax(-1, keepdim=True).cpu().numpy()
            return [self._row(row, np.ones(1, np.float32)) for row in best]
        whole = (scores / sampling.temperature).softmax(-1)
        if not sampling.truncates:
            every = np.arange(whole.shape[1])
            return [self._row(every, row) for row in whole.cpu().numpy()]
        return [self._truncated(row) for row in whole.cpu().numpy()]

    def _truncated(self, probs: NDArray[np.float32]) -> Distribution:
        """What survives of one row of ``probs`` `[columns]`, most probable first."""
        for floor in FLOORS:
            above = np.flatnonzero(probs > floor)
            above = above[probs[above].argsort()[::-1]]
            best = probs[above]
            kept = self._kept(best) if len(best) else 0
            if kept < len(best) and len(best) >= self._sampling.top_k:
                break
        return self._row(above[:kept], best[:kept] / best[:kept].sum())

    def _row(self, columns: NDArray[np.int64], probs: NDArray[np.float32]) -> Distribution:
        return Distribution(columns if self._ids is None else self._ids[columns], probs)

    def _kept(self, probs: NDArray[np.float32]) -> int:
        """How many of the descending ``probs`` survive top-k, top-p and min-p."""
        sampling = self._sampling
        if sampling.top_k:
            probs = probs[probs >= probs[min(sampling.top_k, len(probs)) - 1]]
        if sampling.top_p < 1:
            mass = probs.cumsum()
            bound = sampling.top_p * (mass[-1] if sampling.top_k else 1)
            last = max(int((mass - probs < bound).sum()) - 1, 0)
            probs = probs[probs >= probs[last]]
        if sampling.min_p:
            probs = probs[probs >= sampling.min_p * probs[0]]
        return len(probs)

    def _penalised(
        self, scores: torch.Tensor, columns: torch.Tensor, sequence: list[int], first: int
    ) -> torch.Tensor:
        penalty = self._sampling.repetition_penalty
        if penalty == 1:
            return scores
        seen = torch.zeros(1 + max(int(columns.max()), *sequence), dtype=torch.bool)
        seen[sequence[:first]] = True
        rows = []
        for row in range(len(scores)):
            if row:
                seen[sequence[first + row - 1]] = True
            rows.append(seen[columns.cpu()])
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(torch.stack(rows).to(scores.device), penalised, scores)

    def _suppressed(self, scores: torch.Tensor, columns: torch.Tensor, first: int) -> torch.Tensor:
        sampling, start = self._sampling, first - self._prompt_length
        banned = [list(sampling.suppress_tokens) for _ in scores]
        for row, ids in enumerate(banned):
            if start + row < sampling.min_new_tokens:
                ids.extend(sampling.eos_token_ids)
            if start + row == 0:
                ids.extend(sampling.begin_suppress_tokens)
        if not any(banned):
            return scores
        scores = scores.clone()
        for row, ids in enumerate(banned):
            for token in ids:
                if token not in self._column_of:
                    self._column_of[token] = (columns == token).nonzero()[:, 0]
                scores[row, self._column_of[token]] = float("-inf")
        return scores
