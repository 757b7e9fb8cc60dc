"""PARD: all drafts of a round from one pass, with mask tokens (arXiv 2504.18583)."""

from typing import Any

import torch
from transformers import PreTrainedModel

from tts.cached_model import Rows
from tts.drafting.autoregressive import AutoregressiveDrafter, read
from tts.drafting.protocol import Replay, Window
from tts.errors import UserError

DEPTH = 4  # tokens a root predicts when an update replays it: one from its own row, then masks
SPACING = 2  # positions between roots
DECAY = 0.8  # weight of a row against the one before


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
        self._block = rows.part(pending, None)
        return rows.part(0, pending + 1)

    def _next_row(self, tokens: list[int]) -> Rows:
        return self._block.part(len(tokens), len(tokens) + 1)

    @staticmethod
    def replay(model: Any, window: Window) -> Replay:
        """Every row, and the masks after every other one, in one pass.

        The mask j behind root t stands at position t + j and sees the text up to t and the masks of
        the same root before it.
        """
        device, count = model.device, len(window.tokens)
        root = torch.arange(count - 1, -1, -SPACING, device=device).flip(0)
        step = torch.arange(1, DEPTH, device=device)
        behind, ahead = (x.flatten() for x in torch.meshgrid(root, step, indexing="ij"))
        known = behind + ahead < count
        behind, ahead = behind[known], ahead[known]
        text = torch.tensor(window.tokens, device=device)
        held = window.prefix[0][0].shape[2]
        row, mask = beside(behind, ahead, count, held, window.sight)
        ids = torch.cat([text, text.new_full((len(behind),), model.config.pard_token)])
        logits = read(model, window, ids, row, mask[None, None])
        depth = torch.cat([torch.zeros(count, dtype=torch.long, device=device), ahead])
        return Replay(logits, row, DECAY**depth)

    def bare(
        self, model: PreTrainedModel, sequence: list[int], window: Window, fresh: int, clean: bool
    ) -> torch.Tensor:
        start = window.rows.first - 1
        bare = self._bare_up_to(model, start, clean)
        if start > bare.length:
            bare.feed(sequence[bare.length : start])
        with torch.no_grad():
            said = self.replay(model, window._replace(prefix=bare.cache.keys_values(start)))
        return said.logits[said.row >= fresh - window.rows.first]


def beside(
    behind: torch.Tensor, ahead: torch.Tensor, count: int, held: int = 0, sight: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of many roots laid out beside one text, so that a single pass reads them all.

    Args:
        behind: `[masks]` row of the text that each mask's root is.
        ahead: `[masks]` positions from there, 1, 2, ...; those before it have to be there, too.
        count: rows of the text.
        held: cached positions before the text.
        sight: positions a row sees, itself included (None: all).

    Returns:
        row: `[count + masks]` position in the text of each row.
        seen: bool `[count + masks, held + count + masks]`: a mask sees the text up to its root and
            the masks of that root before it.
    """
    every = torch.arange(count, device=behind.device)
    row = torch.cat([every, behind + ahead])
    key = torch.arange(-held, count, device=behind.device)
    text = key <= torch.cat([every, behind])[:, None]
    if sight is not None:
        text &= key > row[:, None] - sight
    seen = torch.zeros(len(row), held + len(row), dtype=torch.bool, device=behind.device)
    seen[:, : held + count] = text
    seen[count:, held + count :] = (behind[:, None] == behind) & (ahead <= ahead[:, None])
    return row, seen
