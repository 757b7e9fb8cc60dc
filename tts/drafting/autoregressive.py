"""An independent small language model that drafts token by token."""

from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from tts.cache import filled, window_mask
from tts.cached_model import CachedModel, Rows
from tts.drafting.chain import ChainDrafter
from tts.drafting.protocol import Replay, Window
from tts.evidence import Rows as Evidence


class AutoregressiveDrafter(ChainDrafter):
    """Drafts with ``model``, an ordinary causal language model with the target's token ids.

    After drafting g tokens the cache lacks the last one, so a fully accepted block leaves it one
    token behind; rounds without drafts leave it further behind. Whatever is missing is fed in one
    block before the next draft.

    Args:
        model: the draft.
        vocab_size: ids of the target; columns of a wider draft are cut off.
        window: sliding window over the draft's context (None: the whole context).
    """

    layers: tuple[int, ...] = ()
    targets: ClassVar[tuple[str, ...]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    least_rows: ClassVar[int] = 1
    shares_keys: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, vocab_size: int, window: int | None = None) -> None:
        self._cached = CachedModel(model, window)
        self.columns = self._cached.columns
        self._width = vocab_size if self.columns is None else None
        self._bare: CachedModel | None = None  # the bare draft on its own keys

    def prefill(self, sequence: list[int], features: torch.Tensor | None) -> None:
        missing = sequence[self._cached.length : -1]
        if missing:
            rows = self._feed(missing, keep=max(1, min(self.hears, len(missing))))
            self._see(rows.hidden, len(sequence))

    def _first_rows(self, sequence: list[int], gamma: int, pending: int) -> Rows:
        rows = self._feed(sequence[self._cached.length :], keep=pending + 1)
        self._cached.mark()
        return rows

    def _next_row(self, tokens: list[int]) -> Rows:
        return self._feed(tokens[-1:])

    def _late_rows(self, sequence: list[int], pending: int) -> Rows:
        return self._feed(sequence[self._cached.length : -1], keep=pending)

    def commit(self, length: int, features: torch.Tensor | None) -> None:
        # the newest committed token is never in the cache
        self._cached.rollback(min(self._cached.length, length - 1))

    @staticmethod
    def adaptable(model: Any) -> tuple[int, ...] | None:
        return None

    def window(self, sequence: list[int], rows: Evidence) -> Window:
        start, end = rows.first - 1, rows.end - 1
        if self._cached.length < start:
            self._feed(sequence[self._cached.length : start])
        cache = self._cached.cache
        return Window(rows, sequence[start:end], cache.keys_values(start), cache.window)

    @staticmethod
    def replay(model: Any, window: Window) -> Replay:
        device, rows = model.device, len(window.tokens)
        mask = window_mask(window.sight, window.rows.first - 1, rows)
        ids, every = torch.tensor(window.tokens, device=device), torch.arange(rows, device=device)
        logits = read(model, window, ids, every, None if mask is None else mask.to(device))
        return Replay(logits, every, torch.ones(rows, device=device))

    def bare(
        self, model: PreTrainedModel, sequence: list[int], window: Window, fresh: int, clean: bool
    ) -> torch.Tensor:
        bare = self._bare_up_to(model, fresh - 1, clean)
        end = window.rows.end
        return bare.feed(sequence[bare.length : end - 1], keep=end - fresh).logits

    def _bare_up_to(self, model: PreTrainedModel, end: int, clean: bool) -> CachedModel:
        """The bare draft on keys of its own, of at most the first ``end`` positions."""
        if self._bare is None:
            self._bare = CachedModel(model, self._cached.cache.window)
        if clean and not self._bare.length:  # instead of reading the context once more
            self._bare.adopt(self._cached, min(end, self._cached.length))
        self._bare.rollback(min(self._bare.length, end))
        return self._bare

    def recompute(self, sequence: list[int], count: int) -> None:
        length = self._cached.length
        self._cached.rollback(max(0, length - count))
        self._feed(sequence[self._cached.length : length])

    def _feed(self, tokens: list[int], keep: int = 1) -> Rows:
        rows = self._cached.feed(tokens, keep)
        return Rows(rows.hidden, rows.logits[:, : self._width])


def read(
    model: Any, window: Window, ids: torch.Tensor, row: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Logits `[ids, columns]` of ``ids`` behind the keys before ``window``; gradients flow.

    Args:
        model: a causal language model, of a reduced vocabulary or not.
        window: whose first token has row 0.
        ids: int64 `[ids]`.
        row: int64 `[ids]` position of each, from the window's first token.
        mask: bool `[1, 1, ids, keys and ids]` what each sees (None: causal).
    """
    reduced = {"full_width": False} if hasattr(model, "draft_ids") else {}
    output = model(
        input_ids=ids[None],
        attention_mask=mask,
        position_ids=(window.rows.first - 1 + row)[None],
        past_key_values=filled(window.prefix, model.dtype),
        use_cache=True,
        **reduced,
    )
    logits: torch.Tensor = output.logits[0]
    return logits
