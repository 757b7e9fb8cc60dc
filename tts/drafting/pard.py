"""PARD: all drafts of a round from one pass, with mask tokens (arXiv 2504.18583)."""

from transformers import PreTrainedModel

from tts.cached_model import Rows
from tts.drafting.autoregressive import AutoregressiveDrafter
from tts.errors import UserError


def mask_token(model: PreTrainedModel) -> int | None:
    """The mask id of a PARD checkpoint (``pard_token`` of its config), None for any other model."""
    token: int | None = getattr(model.config, "pard_token", None)
    return token


class PardDrafter(AutoregressiveDrafter):
    """Feeds what is new, then gamma - 1 masks; row j of the end predicts draft j + 1.

    The masks' keys are dropped at once and accepted drafts are fed as real tokens in the next
    round, so that the cache only ever holds committed tokens. Drafts of a block are drawn
    independently, each from its own row: q is what it was drawn from, and every acceptance rule
    applies as it is. A token's signals are read after it was drawn, and it stays drafted.

    Args:
        model: a causal language model with ``pard_token`` in its config.
        vocab_size: ids of the target.
        window: sliding window over the draft's context (None: the whole context).

    Raises:
        UserError: for a mask outside the draft's vocabulary, or a draft with recurrent layers.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, window: int | None = None) -> None:
        super().__init__(model, vocab_size, window)
        mask, size = mask_token(model), model.get_input_embeddings().num_embeddings
        if mask is None or not 0 <= mask < size:
            raise UserError(
                f"draft: pard_token {mask} is outside its vocabulary of {size}: mend it"
            )
        if self._cached.cache.is_recurrent:
            raise UserError("draft: masks would stay in its recurrent layers: use attention only")
        self._mask = mask

    def _first_rows(self, sequence: list[int], gamma: int, pending: int) -> Rows:
        fed = sequence[self._cached.length :] + [self._mask] * (gamma - 1)
        rows = self._feed(fed, keep=pending + gamma)
        self._cached.rollback(len(sequence))
        self._block = Rows(*(part[pending:] for part in rows))
        return Rows(*(part[: pending + 1] for part in rows))

    def _next_row(self, tokens: list[int]) -> Rows:
        return Rows(*(part[len(tokens) :][:1] for part in self._block))
