"""What drafters share that read hidden states of the target."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from tts.cache import RollbackCache
from tts.drafting.chain import ChainDrafter
from tts.drafting.protocol import Replay, Window


class FeatureDrafter(ChainDrafter):
    """Keeps keys and values of committed positions only, made of the target's features.

    Those keys depend neither on drafts nor on the layers that are adapted: what a round adds is
    dropped, and the bare draft can be replayed on the live draft's keys.

    Args:
        model: reads ``config.target_layers``.
        vocab_size: ids of the target.
        window: sliding window over the draft's context (None: the whole context).
    """

    targets: ClassVar[tuple[str, ...]] = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    shares_keys: ClassVar[bool] = True

    def __init__(self, model: Any, vocab_size: int, window: int | None = None) -> None:
        self._model = model
        self.layers = tuple(model.config.target_layers)
        self.columns = model.draft_ids
        self._cache = RollbackCache(model.config, window)
        self._held = 0  # committed positions in the cache
        self._unread: list[torch.Tensor] = []  # features of the positions after those

    def commit(self, length: int, features: torch.Tensor | None) -> None:
        if features is not None:
            self._unread.append(features)

    def _next_features(self, count: int) -> torch.Tensor:
        """Features of the first ``count`` positions that are not in the cache, as they are read."""
        features = torch.cat(self._unread)
        self._unread = [features[count:]]
        return features[:count].to(self._stream)

    @property
    def _stream(self) -> torch.dtype:
        """That of the rows between the model's products."""
        stream: torch.dtype = self._model.stream or self._model.dtype
        return stream

    @staticmethod
    def adaptable(model: Any) -> tuple[int, ...] | None:
        """Every layer, where the context's keys are functions of the features alone."""
        return None

    @staticmethod
    @abstractmethod
    def replay(model: Any, window: Window) -> Replay:
        """See `TrainableDrafter`."""

    def bare(
        self, model: PreTrainedModel, sequence: list[int], window: Window, fresh: int, clean: bool
    ) -> torch.Tensor:
        with torch.no_grad():
            said = self.replay(model, window)
        return said.logits[said.row >= fresh - window.rows.first]

    def recompute(self, sequence: list[int], count: int) -> None:
        pass  # the keys are those of the weights as they are
