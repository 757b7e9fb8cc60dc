"""What some of the target's layers hold over a corpus: the input of drafters that read the target.

Computed once and kept beside the shards, 3,456 bytes a position for three layers of the default
model; a later training run, of any drafter that reads the same layers, only opens the files.
"""

from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tts.distill.corpus import Corpus
from tts.errors import UserError


class Features:
    """Features `[rows, layers x hidden]` of every sequence of a corpus.

    Args:
        corpus: whose text it is.
        target: run over the shards that have no features yet.
        layers: indices into transformers' ``hidden_states`` (0: the embedding).
        on_shard: called after every shard.

    Raises:
        UserError: a damaged file, or a folder that cannot be written.
    """

    def __init__(
        self,
        corpus: Corpus,
        target: PreTrainedModel,
        layers: tuple[int, ...],
        on_shard: Callable[[], object] = lambda: None,
    ) -> None:
        self._corpus, self._files, self._first = corpus, [], []
        name = "features-" + "-".join(map(str, layers))
        for shard, file in enumerate(corpus.files):
            stored = file.parent / name / file.name
            sequences = corpus.sequences(shard)
            if not stored.is_file():
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

    def batch(self, sequences: torch.Tensor) -> torch.Tensor:
        """Features `[sequences, longest, layers x hidden]`, zeros behind the shorter ones."""
        parts = []
        for sequence in sequences.tolist():
            start = self._first[sequence]
            rows = slice(start, start + self._corpus.lengths[sequence])
            parts.append(self._files[self._corpus.shard(sequence)][rows])
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


@torch.inference_mode()
def _run(
    target: PreTrainedModel, corpus: Corpus, sequences: range, layers: tuple[int, ...]
) -> torch.Tensor:
    """Features of all sequences of a shard, one after the other, in bfloat16."""
    parts = []
    for some in torch.tensor(sequences).split(8):
        lengths = [corpus.lengths[sequence] for sequence in some.tolist()]
        tokens = corpus.tokens[some][:, : max(lengths)].to(target.device)
        states = target.base_model(
            input_ids=tokens, use_cache=False, output_hidden_states=True
        ).hidden_states
        chosen = torch.cat([states[layer] for layer in layers], -1).to("cpu", torch.bfloat16)
        parts += [rows[:length] for rows, length in zip(chosen, lengths, strict=True)]
    return torch.cat(parts)
