"""EAGLE-3, a chain: one layer that reads the target's features and then its own."""

from typing import Any, ClassVar

import torch

from tts.cache import filled, window_mask
from tts.cached_model import CHUNK, Rows
from tts.drafting.features import FeatureDrafter
from tts.drafting.protocol import Replay, Window
from tts.evidence import Rows as Evidence
from tts.lean import norm

# steps that an update replays, and the weight of each against the one before; a further one costs
# almost as much as the first, and what lies deeper is drafted rarely
DEPTH, DECAY = 2, 0.8


class Eagle3Drafter(FeatureDrafter):
    """Drafts with an EAGLE-3 head (`tts.drafting.eagle3_model`), a chain.

    Position i of the cache is pair i. The tokens that were accepted are read again, with their true
    features, in the next round.
    """

    least_rows: ClassVar[int] = 2  # of evidence: the first only has features for the next

    def prefill(self, sequence: list[int], features: torch.Tensor | None) -> None:
        self.commit(len(sequence), features)
        pairs = max(0, len(sequence) - 2 - self._held)  # that are new
        hidden = self._read(sequence[:-1], min(self.hears, pairs))
        self._see(norm(hidden[0], self._model.norm), len(sequence))

    @torch.inference_mode()
    def _first_rows(self, sequence: list[int], gamma: int, pending: int) -> Rows:
        hidden = self._read(sequence, pending + 1)
        self._newest = hidden[:, -1:]
        return self._rows(hidden)

    @torch.inference_mode()
    def _next_row(self, tokens: list[int]) -> Rows:
        token = torch.tensor([tokens[-1:]], device=self._model.device)
        self._newest = self._model(token, self._model.recur(self._newest), self._cache)
        return self._rows(self._newest)

    @torch.inference_mode()
    def _late_rows(self, sequence: list[int], pending: int) -> Rows:
        return self._rows(self._read(sequence[:-1], pending))

    def _rows(self, hidden: torch.Tensor) -> Rows:
        normed = norm(hidden[0], self._model.norm)
        return Rows(normed, self._model.lm_head(normed))

    @torch.inference_mode()
    def _read(self, sequence: list[int], keep: int) -> torch.Tensor:
        """Read every pair of ``sequence`` that is not in the cache; h of the last ``keep`` pairs.

        A sequence of one token has no pair: zeros stand in, which predict all ids alike.
        """
        model = self._model
        self._cache.rollback(self._held)
        tokens = torch.tensor([sequence[self._held + 1 :]], device=model.device)
        zeros = torch.zeros(1, keep, model.config.hidden_size, dtype=self._stream)
        parts = [zeros.to(model.device)]
        if tokens.numel():
            features = self._next_features(tokens.numel())
            for ids, piece in zip(tokens.split(CHUNK, 1), features.split(CHUNK), strict=True):
                mask = window_mask(self._cache.window, self._held, len(piece))
                mask = None if mask is None else mask.to(model.device)
                parts.append(model(ids, model.fuse(piece[None]), self._cache, mask))
                self._held += len(piece)
        return torch.cat(parts, 1)[:, -keep:] if keep else parts[0]

    @staticmethod
    def adaptable(model: Any) -> tuple[int, ...] | None:
        # whatever lies below would change the keys of the last layer
        return (len(model.layers) - 1,)

    def window(self, sequence: list[int], rows: Evidence) -> Window:
        self._read(sequence[: rows.first], 0)
        # the features at row r belong to pair first - 1 + r, which predicts what row r + 1 does
        prefix = self._cache.keys_values(rows.first - 1)
        return Window(rows, sequence[rows.first : rows.end - 1], prefix, self._cache.window)

    @staticmethod
    def replay(model: Any, window: Window) -> Replay:
        assert window.rows.features is not None
        device = model.device
        steps = model.unroll(
            torch.tensor([window.tokens], device=device),
            window.rows.features[None, :-1],
            min(DEPTH, len(window.tokens)),
            filled(window.prefix, model.dtype),
            first=window.rows.first - 1,
            window=window.sight,
        )
        count = len(window.tokens)
        row = torch.cat([torch.arange(i + 1, count + 1, device=device) for i in range(len(steps))])
        weight = [DECAY**i * torch.ones(s.shape[1], device=device) for i, s in enumerate(steps)]
        return Replay(model.lm_head(model.norm(torch.cat(steps, 1)[0])), row, torch.cat(weight))
