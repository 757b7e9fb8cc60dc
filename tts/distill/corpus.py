"""Training text with what the target says about it: token ids and cached final hidden states.

A corpus is a folder of shards. A shard is one safetensors file: ``tokens`` int32 [S, L], sequences
padded with zeros; ``counts`` uint8 [S, L-1], row t counts if the target generated token t+1;
``log_mass`` float32 [R], logsumexp of the target's logits / temperature at every counted row,
sequence after sequence; ``hidden`` [R, H], its final hidden states there, unless the text was
written without. Teacher probabilities come from these with the frozen head.
"""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tts.errors import UserError


@dataclass(frozen=True, slots=True)
class Shard:
    """Sequences of equal length and the target's view of the counted rows; see above."""

    tokens: torch.Tensor
    counts: torch.Tensor
    log_mass: torch.Tensor
    hidden: torch.Tensor | None

    def save(self, folder: Path, temperature: float) -> None:
        """Add to the corpus in ``folder``; a shard appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        taken = (int(file.stem) for file in folder.glob("*.safetensors"))  # some may be deleted
        name = f"{max(taken, default=-1) + 1:05d}.safetensors"
        tensors = {
            "tokens": self.tokens.int(),
            "counts": self.counts.to(torch.uint8),
            "log_mass": self.log_mass,
        }
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
        partial = folder / f".{name}.partial"
        save_file(tensors, partial, {"temperature": str(temperature)})
        partial.rename(folder / name)


class Corpus:
    """Shards of one or more folders; hidden states stay on disk until they are asked for.

    Args:
        folders: each written by `tts selftext`.
        temperature: at which the teacher will be asked; it must be the one in the shards.

    Raises:
        UserError: a folder without shards, a damaged one, or another temperature.
    """

    def __init__(self, folders: list[Path], temperature: float) -> None:
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        if not files:
            names = ", ".join(map(str, folders))
            raise UserError(f"corpus: no shards in {names}: write some with `tts selftext`")
        tokens, counts, log_mass = [], [], []
        self._shards = []
        for file in files:
            try:
                shard = safe_open(file, "pt")
                tokens.append(shard.get_tensor("tokens"))
                counts.append(shard.get_tensor("counts").bool())
                log_mass.append(shard.get_tensor("log_mass"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"corpus: {file} is damaged ({error}): delete it") from None
            if float(shard.metadata()["temperature"]) != temperature:
                raise UserError(
                    f"temperature: {temperature} is not the {shard.metadata()['temperature']} that "
                    f"{file} was written for: write the text again"
                )
            self._shards.append(shard)
        length = max(part.shape[1] for part in tokens)
        pad = torch.nn.functional.pad
        self.tokens = torch.cat([pad(t, (0, length - t.shape[1])) for t in tokens])
        self.counts = torch.cat([pad(c, (0, length - 1 - c.shape[1])) for c in counts])
        self._sizes: list[int] = self.counts.sum(1).tolist()  # counted rows of each sequence
        self._log_mass = torch.cat(log_mass).split(self._sizes)
        # rows of each sequence up to the last that counts: nothing is learned after them
        rows = torch.arange(1, length)
        self.lengths: list[int] = (self.counts * rows).amax(1).tolist()
        self.files = files
        self._first_sequence = [0]
        self._first_row: list[int] = []  # of each sequence, within its shard
        for part in counts:
            self._first_sequence.append(self._first_sequence[-1] + len(part))
            sizes = part.sum(1)
            self._first_row += (sizes.cumsum(0) - sizes).tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def shard(self, sequence: int) -> int:
        """Index in ``files`` of the shard that holds ``sequence``."""
        return bisect_right(self._first_sequence, sequence) - 1

    def sequences(self, shard: int) -> range:
        """The sequences of a shard."""
        return range(self._first_sequence[shard], self._first_sequence[shard + 1])

    def log_mass(self, sequences: torch.Tensor) -> torch.Tensor:
        """log_mass [R] of the counted rows of ``sequences``, in their order."""
        return torch.cat([self._log_mass[sequence] for sequence in sequences.tolist()])

    def states(self, sequences: torch.Tensor) -> torch.Tensor:
        """The target's final hidden states [R, H] of the counted rows of ``sequences``.

        Raises:
            UserError: where the text was written without them.
        """
        parts = []
        for sequence in sequences.tolist():
            shard = self.shard(sequence)
            start = self._first_row[sequence]
            rows = slice(start, start + self._sizes[sequence])
            try:
                parts.append(self._shards[shard].get_slice("hidden")[rows])
            except SafetensorError:
                raise UserError(
                    f"corpus: {self.files[shard]} was written without states: train with "
                    "--recompute true"
                ) from None
        return torch.cat(parts)


@torch.inference_mode()
def annotate(
    target: PreTrainedModel, tokens: torch.Tensor, counts: torch.Tensor, temperature: float
) -> Shard:
    """Run ``target`` over text that it wrote elsewhere: ``tokens`` [S, L], ``counts`` [S, L-1]."""
    longest = int(counts.any(0).nonzero().max()) + 1  # nothing counts behind it
    output = target.base_model(input_ids=tokens[:, :longest].to(target.device))
    hidden = output.last_hidden_state[counts[:, :longest].to(target.device)]
    log_mass = torch.cat(
        [
            (target.get_output_embeddings()(rows).float() / temperature).logsumexp(-1)
            for rows in hidden.split(512)
        ]
    )
    return Shard(tokens, counts, log_mass, hidden)


def read_tokens(file: Path, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(tokens [S, length], counts [S, length - 1])`` of a plain token file.

    The file holds ``tokens`` [N] end to end, ``offsets`` [S+1], and ``assistant_start`` [S]: where
    in each sequence the generated answer begins. Longer sequences are cut.

    Raises:
        UserError: a file that is missing or without these arrays.
    """
    try:
        arrays = load_file(file)
        sizes = arrays["offsets"].diff().tolist()
        sequences = arrays["tokens"].int().split(sizes)
        starts = arrays["assistant_start"].tolist()
    except FileNotFoundError:
        raise UserError(f"tokens: no file {file}: check the path") from None
    except (SafetensorError, KeyError) as error:
        raise UserError(f"tokens: {file} is not a token file ({error})") from None
    tokens = torch.zeros(len(sequences), length, dtype=torch.int32)
    counts = torch.zeros(len(sequences), length - 1, dtype=torch.bool)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        end = min(len(sequence), length)
        tokens[row, :end] = sequence[:end]
        counts[row, max(0, start - 1) : end - 1] = True
    return tokens, counts
