"""Text that the target wrote itself, as token ids: what an offline draft is trained on.

One safetensors file: ``tokens`` [N] all sequences end to end; ``offsets`` int64 [S+1], sequence i
is tokens[offsets[i]:offsets[i+1]]; and which tokens the target generated as the assistant, either
as ``generated`` uint8 [N] or, where it is the tail of each sequence, ``assistant_start`` int32 [S].
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tts.errors import UserError


@dataclass(frozen=True, slots=True)
class Corpus:
    """Padded sequences and the positions that count."""

    tokens: torch.Tensor  # int32 [sequences, length]
    counts: torch.Tensor  # bool [sequences, length - 1]: token t+1 was generated, so row t counts

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: torch.Tensor | slice) -> "Corpus":
        """The sequences at ``index``."""
        return Corpus(self.tokens[index], self.counts[index])


def load_corpus(paths: list[Path], length: int) -> Corpus:
    """Read and join files; sequences are cut into pieces of at most ``length`` tokens.

    Raises:
        UserError: a file that is missing, damaged, or without the arrays named above.
    """
    tokens: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    for path in paths:
        for sequence, generated in _sequences(path):
            for piece, flags in zip(sequence.split(length), generated.split(length), strict=True):
                if flags[1:].any():
                    pad = length - len(piece)
                    tokens.append(torch.nn.functional.pad(piece, (0, pad)))
                    counts.append(torch.nn.functional.pad(flags[1:], (0, pad)))
    if not tokens:
        raise UserError(f"corpus: {', '.join(map(str, paths))} hold no generated token")
    return Corpus(torch.stack(tokens).int(), torch.stack(counts))


def save_corpus(path: Path, tokens: torch.Tensor, generated: torch.Tensor) -> None:
    """Write sequences of equal length: ``tokens`` [S, L] and ``generated`` bool [S, L]."""
    offsets = torch.arange(len(tokens) + 1, dtype=torch.int64) * tokens.shape[1]
    small = torch.uint16 if int(tokens.max()) < 2**16 else torch.int32
    save_file(
        {
            "tokens": tokens.flatten().to(small),
            "generated": generated.flatten().to(torch.uint8),
            "offsets": offsets,
        },
        path,
    )


def _sequences(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    try:
        arrays = load_file(path)
        offsets = arrays["offsets"].tolist()
        tokens = arrays["tokens"].int()
        generated = torch.zeros(len(tokens), dtype=torch.bool)
        if "generated" in arrays:
            generated = arrays["generated"].bool()
        else:
            starts = arrays["assistant_start"].tolist()
            for (start, end), answer in zip(pairwise(offsets), starts, strict=True):
                generated[start + answer : end] = True
    except FileNotFoundError:
        raise UserError(f"corpus: no file {path}: make one with `tts selftext`") from None
    except (SafetensorError, KeyError) as error:
        raise UserError(f"corpus: {path} is not a self-text file ({error})") from None
    lengths = [end - start for start, end in pairwise(offsets)]
    return list(zip(tokens.split(lengths), generated.split(lengths), strict=True))
