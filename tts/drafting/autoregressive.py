"""An independent small language model that drafts token by token."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from tts.cached_model import CachedModel, Rows
from tts.drafting.protocol import Draw, Proposal
from tts.policy import Signals, signals
from tts.sampling import Distribution, Warper, join


class AutoregressiveDrafter:
    """Drafts with ``model``, an ordinary causal language model with the target's token ids.

    After drafting g tokens the cache lacks the last one, so a fully accepted block leaves it one
    token behind; rounds without drafts leave it further behind. Whatever is missing is fed in one
    block before the next draft.

    Args:
        model: the draft.
        vocab_size: ids of the target; columns of a wider draft are cut off.
        window: sliding window over the draft's context (None: the whole context).
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, window: int | None = None) -> None:
        self._cached = CachedModel(model, window)
        self._width = vocab_size if self._cached.columns is None else None

    def begin(self, warper: Callable[..., Warper]) -> None:
        self._warp = warper(self._cached.columns)

    def prefill(self, sequence: list[int]) -> None:
        missing = sequence[self._cached.length : -1]
        if missing:
            self._feed(missing)

    def propose(
        self,
        sequence: list[int],
        gamma: int,
        pending: int,
        draw: Draw,
        proceed: Callable[[Signals], bool],
    ) -> Proposal:
        rows = self._first_rows(sequence, gamma, pending)
        start = len(sequence)
        warped = self._warp(rows.logits, sequence, start - pending)
        late = warped[:pending] if pending else None
        tokens: list[int] = []
        drawn: list[Distribution] = []
        said: list[Signals] = []
        q = warped[pending:]
        while True:
            token = draw(q, start + len(tokens))
            probability = float(q.of(q.ids.new_tensor([[token]])))
            row = rows.logits[-1], rows.hidden[-1]  # what q was made of
            said.append(signals(*row, len(tokens), probability, token))
            tokens.append(token)
            drawn.append(q)
            if len(tokens) == gamma or not proceed(said[-1]):
                return Proposal(tokens, join(drawn), said, late)
            rows = self._next_row(tokens)
            q = self._warp(rows.logits, sequence + tokens, start + len(tokens))

    def _first_rows(self, sequence: list[int], gamma: int, pending: int) -> Rows:
        """The `pending + 1` rows for the pending positions and the first draft."""
        rows = self._feed(sequence[self._cached.length :], keep=pending + 1)
        self._cached.mark()
        return rows

    def _next_row(self, tokens: list[int]) -> Rows:
        """The single row for the draft after ``tokens``, the drafts so far."""
        return self._feed(tokens[-1:])

    def catch_up(self, sequence: list[int], pending: int) -> Distribution:
        fed = sequence[self._cached.length : -1]
        rows = self._feed(fed, keep=pending)
        return self._warp(rows.logits, sequence, len(sequence) - pending)

    def commit(self, length: int) -> None:
        # the newest committed token is never in the cache
        self._cached.rollback(min(self._cached.length, length - 1))

    def keys_values(self, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._cached.cache.keys_values(length)

    def lend(self, bare: CachedModel, length: int) -> None:
        bare.adopt(self._cached, length)

    def recompute(self, sequence: list[int], count: int) -> None:
        length = self._cached.length
        self._cached.rollback(max(0, length - count))
        self._feed(sequence[self._cached.length : length])

    def _feed(self, tokens: list[int], keep: int = 1) -> Rows:
        rows = self._cached.feed(tokens, keep)
        return Rows(rows.hidden, rows.logits[:, : self._width])
