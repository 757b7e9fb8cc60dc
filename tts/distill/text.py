"""Text for a trainer: a corpus, and what the target says and holds over any batch of it.

`StoredText` reads that from disk, where writing the text or an earlier training has left it: the
target need not be run again, which is what counts on a CPU. `RecomputedText` runs the target over
every batch: on a GPU that takes less time than reading, and the corpus may be of any size.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tts.attention import whole_steps
from tts.cache import RollbackCache
from tts.distill.corpus import Corpus
from tts.errors import UserError


class Text(Protocol):
    """A corpus and the target's view of it."""

    corpus: Corpus

    def features(self, sequences: torch.Tensor) -> torch.Tensor:
        """What a head reads, `[sequences, longest, layers x hidden]`; behind the shorter ones
        anything may stand."""
        ...

    def teacher(self, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(final hidden states [R, H], log_mass [R]) of the counted rows, in their order."""
        ...


class StoredText:
    """A corpus with its final states, and features kept beside the shards.

    Features of three layers of the default model take 3,456 bytes a position; a later training
    run, of any drafter that reads the same layers, only opens the files.

    Args:
        corpus: whose text it is.
        target: run over the shards that have no features yet.
        layers: indices into transformers' ``hidden_states`` (0: the embedding; empty: no features).
        on_shard: called after every shard.

    Raises:
        UserError: a damaged file, or a folder that cannot be written.
    """

    def __init__(
        self,
        corpus: Corpus,
        target: PreTrainedModel | None = None,
        layers: tuple[int, ...] = (),
        on_shard: Callable[[], object] = lambda: None,
    ) -> None:
        self.corpus, self._files, self._first = corpus, [], []
        if not layers:
            return
        name = "features-" + "-".join(map(str, layers))
        for shard, file in enumerate(corpus.files):
            stored = file.parent / name / file.name
            sequences = corpus.sequences(shard)
            if not stored.is_file():
                assert target is not None
                features = _run(target, corpus, sequences, layers)
                partial = stored.with_suffix(".partial")
                try:
                    stored.parent.mkdir(exist_ok=True)
                    save_file({"features": features}, partial)
                    partial.rename(stored)
                except (OSError, SafetensorError) as error:
                    raise UserError(
                        f"corpus: {stored.parent} cannot be written ({error}): make room there"
                    ) from None
            try:
                self._files.append(safe_open(stored, "pt").get_slice("features"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"corpus: {stored} is damaged ({error}): delete it") from None
            start = 0
            for sequence in sequences:
                self._first.append(start)
                start += corpus.lengths[sequence]
            on_shard()

    def features(self, sequences: torch.Tensor) -> torch.Tensor:
        parts = []
        for sequence in sequences.tolist():
            start = self._first[sequence]
            rows = slice(start, start + self.corpus.lengths[sequence])
            parts.append(self._files[self.corpus.shard(sequence)][rows])
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def teacher(self, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.corpus.states(sequences), self.corpus.log_mass(sequences)


class RecomputedText:
    """A corpus whose target is run again over every batch; nothing of it need be stored.

    Args:
        corpus: whose text it is.
        target: that wrote it.
        layers: as of `StoredText`.
    """

    def __init__(self, corpus: Corpus, target: PreTrainedModel, layers: tuple[int, ...]) -> None:
        self.corpus, self._target, self._layers = corpus, target, layers
        self._newest: torch.Tensor | None = None  # the batch that the target read last

    def features(self, sequences: torch.Tensor) -> torch.Tensor:
        self._read(sequences)
        return self._features

    def teacher(self, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._read(sequences)
        return self._hidden, self.corpus.log_mass(sequences)

    def _read(self, sequences: torch.Tensor) -> None:
        if self._newest is not sequences:
            states = _states(self._target, self.corpus, sequences, bool(self._layers))
            counts = self.corpus.counts[sequences][:, : states[-1].shape[1]]
            self._hidden = states[-1][counts.to(states[-1].device)]
            if self._layers:
                self._features = torch.cat([states[layer] for layer in self._layers], -1)
            self._newest = sequences


@torch.no_grad()
def _states(
    target: PreTrainedModel, corpus: Corpus, sequences: torch.Tensor, every: bool
) -> tuple[torch.Tensor, ...]:
    """Hidden states `[sequences, longest, hidden]`: the last, after ``every`` other layer's."""
    longest = max(corpus.lengths[sequence] for sequence in sequences.tolist())
    tokens = corpus.tokens[sequences][:, :longest].to(target.device)
    # the cache is of no use but for the shorter way through the model (`tts.llama`)
    cache = RollbackCache(target.config, block=whole_steps(longest))
    with torch.autocast(target.device.type, enabled=False):
        output = target.base_model(
            input_ids=tokens, past_key_values=cache, output_hidden_states=every
        )
    return output.hidden_states if every else (output.last_hidden_state,)


def _run(
    target: PreTrainedModel, corpus: Corpus, sequences: range, layers: tuple[int, ...]
) -> torch.Tensor:
    """Features of all sequences of a shard, one after the other, in bfloat16."""
    parts = []
    for some in torch.tensor(sequences).split(8):
        states = _states(target, corpus, some, every=True)
        chosen = torch.cat([states[layer] for layer in layers], -1).to("cpu", torch.bfloat16)
        lengths = [corpus.lengths[sequence] for sequence in some.tolist()]
        parts += [rows[:length] for rows, length in zip(chosen, lengths, strict=True)]
    return torch.cat(parts)
