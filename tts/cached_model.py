"""A causal language model together with its cache: feed tokens, get rows, roll back."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from tts.cache import RollbackCache, window_mask

CHUNK = 512  # a long prompt is fed in pieces, which bounds the attention mask


class Rows(NamedTuple):
    """What a model says after each of its last fed tokens."""

    hidden: torch.Tensor  # [rows, hidden] input of the language-model head
    logits: torch.Tensor  # [rows, columns]; column j is token `CachedModel.columns[j]`, or j
    features: torch.Tensor | None = None  # [fed, layers x hidden] of ALL fed tokens, if asked for

    def part(self, start: int, end: int | None) -> "Rows":
        """Some of the rows, without features."""
        return Rows(self.hidden[start:end], self.logits[start:end])


class CachedModel:
    """Feeds a model token by token or in blocks and can take the newest tokens back.

    Args:
        model: any causal language model of transformers, in evaluation mode.
        window: the model sees only the newest ``window`` positions (None: all of them).
        layers: whose states become features, as indices into transformers' ``hidden_states``.
    """

    def __init__(
        self, model: PreTrainedModel, window: int | None = None, layers: tuple[int, ...] = ()
    ) -> None:
        self.model = model
        self._layers = layers
        self.cache = RollbackCache(model.config, window)
        self.length = 0  # tokens in the cache
        # a reduced vocabulary: the token id of each logit column
        self.columns: torch.Tensor | None = getattr(model, "draft_ids", None)
        self._mark = 0
        self._since_mark: list[int] = []
        self._snapshot = self.cache.snapshot()

    def feed(self, tokens: list[int], keep: int = 1) -> Rows:
        """Append ``tokens`` and return the rows of the last ``keep`` of them."""
        last, parts = max(keep, CHUNK), []
        while len(tokens) > last:
            size = min(CHUNK, len(tokens) - keep)  # the last pass has all rows that are kept
            parts.append(self._pass(tokens[:size], 1).features)
            tokens = tokens[size:]
        rows = self._pass(tokens, keep)
        if parts and rows.features is not None:
            rows = rows._replace(features=torch.cat([*parts, rows.features]))  # type: ignore[list-item]
        return rows

    @torch.inference_mode()
    def _pass(self, tokens: list[int], keep: int) -> Rows:
        rows = len(tokens)
        device = self.model.device
        reduced = {} if self.columns is None else {"full_width": False}
        mask = window_mask(self.cache.window, self.length, rows)
        with HeadInput(self.model) as head:
            output = self.model(
                input_ids=torch.tensor([tokens], device=device),
                attention_mask=None if mask is None else mask.to(device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
                output_hidden_states=bool(self._layers),
                **reduced,
            )
        self.length += rows
        if self.cache.is_recurrent:
            self._since_mark.extend(tokens)
        features = None
        if self._layers:
            features = torch.cat([output.hidden_states[i][0] for i in self._layers], -1)
        return Rows(head.hidden[0, -keep:], output.logits[0, -keep:], features)

    def adopt(self, other: "CachedModel", length: int) -> None:
        """Fill the empty cache with copies of the first ``length`` positions of ``other``.

        Both run the same weights; neither has recurrent layers.
        """
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.update(*theirs.keys_values(0, length))
        self.length = length

    def mark(self) -> None:
        """Allow `rollback` down to the present length; free for models without recurrence."""
        if self.cache.is_recurrent:
            self._mark, self._since_mark = self.length, []
            self._snapshot = self.cache.snapshot()

    def rollback(self, length: int) -> None:
        """Forget all tokens from ``length`` on.

        Attention layers drop them at no cost. Recurrent layers go back to the last `mark`, and the
        tokens kept since are fed again: one extra pass.
        """
        if length == self.length:
            return
        if not self.cache.is_recurrent:
            self.cache.rollback(length)
            self.length = length
            return
        assert self._mark <= length < self.length, (self._mark, length, self.length)
        replay = self._since_mark[: length - self._mark]
        self.cache.rollback(self._mark)
        self.cache.restore(self._snapshot)
        self.length, self._since_mark = self._mark, []
        if replay:
            self.feed(replay)


class HeadInput:
    """Captures the input of the output embedding: the hidden state after the final norm."""

    hidden: torch.Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        self._head = model.get_output_embeddings()

    def __enter__(self) -> "HeadInput":
        def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.hidden = inputs[0]

        self._handle = self._head.register_forward_pre_hook(keep)
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()
