"""DFlash: all drafts of a round from one pass over a block of masks."""

from typing import Any, ClassVar

import torch

from tts.cache import filled
from tts.cached_model import CHUNK, Rows
from tts.drafting.dflash_model import block_mask
from tts.drafting.features import FeatureDrafter
from tts.drafting.protocol import Replay, Window
from tts.evidence import Rows as Evidence
from tts.packing import ROWS

SPACING = 2  # positions between the anchors that an update replays
DECAY = 0.8  # weight of a slot against the one before


class DFlashDrafter(FeatureDrafter):
    """Drafts with a DFlash model (`tts.drafting.dflash_model`), at most a block less its anchor.

    The tokens of a block are drawn independently, each from its own row: q is what a token was
    drawn from, and every acceptance rule applies as it is. A token's signals are read after it was
    drawn, and it stays drafted.
    """

    least_rows: ClassVar[int] = 1
    hears = 0  # a prompt's states would take a pass for every few

    def __init__(self, model: Any, vocab_size: int, window: int | None = None) -> None:
        super().__init__(model, vocab_size, window)
        self.longest: int = model.config.block_size - 1

    def prefill(self, sequence: list[int], features: torch.Tensor | None) -> None:
        self.commit(len(sequence), features)
        self._read(len(sequence) - 1)

    @torch.inference_mode()
    def _first_rows(self, sequence: list[int], gamma: int, pending: int) -> Rows:
        newest = len(sequence) - 1
        hidden = self._blocks(sequence, newest - pending, newest + 1)
        rows = self._rows(torch.cat([hidden[:-1, 0], hidden[-1, :gamma]]))
        self._block = rows.part(pending, None)
        return rows.part(0, pending + 1)

    def _next_row(self, tokens: list[int]) -> Rows:
        return self._block.part(len(tokens), len(tokens) + 1)

    @torch.inference_mode()
    def _late_rows(self, sequence: list[int], pending: int) -> Rows:
        end = len(sequence) - 1
        return self._rows(self._blocks(sequence, end - pending, end)[:, 0])

    def _rows(self, hidden: torch.Tensor) -> Rows:
        return Rows(hidden, self._model.lm_head(hidden))

    def _blocks(self, sequence: list[int], first: int, end: int) -> torch.Tensor:
        """States `[anchors, drafts, hidden]` of the blocks at ``first`` to ``end``."""
        count = max(1, ROWS // self._model.config.block_size)  # of as many rows as cost what few do
        groups = [range(a, min(a + count, end)) for a in range(first, end, count)]
        return torch.cat([self._pass(sequence, anchors) for anchors in groups])

    def _pass(self, sequence: list[int], anchors: range) -> torch.Tensor:
        """The same of a few blocks in one pass, each of which sees what lies before it."""
        model, size = self._model, self._model.config.block_size
        self._read(anchors[0])
        place = torch.tensor([list(anchors)], device=model.device)
        tokens = torch.tensor([sequence[anchors.start : anchors.stop]], device=model.device)
        features = mask = None
        if between := len(anchors) - 1:
            features = self._next_features(between)[None]
            keys = range(self._cache.get_mask_sizes(size, 0)[1], anchors[-1])
            mask = block_mask(place, keys, size, self._cache.window)
        hidden = model(tokens, place, self._cache, mask, model.stream, features, self._held)
        self._held += between
        self._cache.rollback(self._held)
        return hidden.view(len(anchors), size, -1)[:, 1:]

    @torch.inference_mode()
    def _read(self, end: int) -> None:
        """Take the features of all positions before ``end`` into the cache."""
        if end > self._held:
            model = self._model
            features = self._next_features(end - self._held)
            for piece in features.split(CHUNK):
                model.read(piece[None], self._cache, self._held)
                self._held += len(piece)

    def window(self, sequence: list[int], rows: Evidence) -> Window:
        first = rows.first - 1  # the position of the first anchor, whose features row 0 holds
        self._read(first)
        prefix = self._cache.keys_values(first)
        return Window(rows, sequence[first : rows.end - 1], prefix, self._cache.window)

    @staticmethod
    def replay(model: Any, window: Window) -> Replay:
        assert window.rows.features is not None
        device, count = model.device, len(window.tokens)
        # from the newest anchor back, so that the newest row is always learned from
        anchor = torch.arange(count - 1, -1, -SPACING, device=device).flip(0)
        first = window.rows.first - 1
        tokens = torch.tensor([window.tokens], device=device)
        hidden = model.unroll(
            tokens[:, anchor],
            first + anchor[None],
            window.rows.features[None],
            filled(window.prefix, model.dtype),
            first=first,
            window=window.sight,
        )[0, :, 1:]
        slot = torch.arange(hidden.shape[1], device=device)
        row = anchor[:, None] + slot
        known = row < count
        weight = (DECAY**slot).expand(row.shape)
        return Replay(model.lm_head(hidden[known]), row[known], weight[known])
