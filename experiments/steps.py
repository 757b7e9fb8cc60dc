"""Step records: at every state the draft goes to the cap and the target verifies once.

If a tokens were accepted, every shorter gamma would have had min(a, gamma): the outcome of each is
known, at states that none of them chose. One JSON line a step, SpecKV's columns first; the draft's
states lie beside the lines, in a file of the same name that ends in .safetensors.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from experiments.options import readable
from tts.errors import UserError
from tts.policy import RoundState, Signals


@dataclass(frozen=True, slots=True)
class Step:
    """One round at one state."""

    compression: str
    gamma: int  # drafted: the cap
    task: str
    step: int  # of its prompt, from 0
    accepted: int
    acceptance_rate: float
    tokens_produced: int  # correction or bonus counted
    mean_draft_entropy: float  # bits, as in SpecKV's file
    mean_draft_confidence: float
    max_draft_entropy: float
    min_draft_confidence: float
    # ours
    prompt: str
    position: int  # generated tokens before the step
    context_length: int
    entropy: list[float]  # nats, one a drafted token
    confidence: list[float]
    probability: list[float]
    acceptance: list[float]  # probability of acceptance, of the offsets on the path
    draft_ms: float
    verify_ms: float
    round_ms: list[float]  # median time here of a round with gamma 0, 1, ..., cap

    @property
    def state(self) -> RoundState:
        return RoundState(self.position, self.context_length, self.gamma)

    def signals(self, hidden: torch.Tensor | None = None) -> list[Signals]:
        """What a policy sees; ``hidden`` `[gamma, width]`: the draft's states of this step."""
        said = zip(self.entropy, self.confidence, self.probability, strict=True)
        return [
            Signals(j, *values, -1, None if hidden is None else hidden[j])
            for j, values in enumerate(said)
        ]


COLUMNS = tuple(field.name for field in fields(Step))


def append(file: Path, step: Step) -> None:
    """One line."""
    with file.open("a") as opened:
        opened.write(json.dumps(asdict(step)) + "\n")


def read(path: str) -> list[Step]:
    """All steps of a file of `tts profile --records`.

    Raises:
        UserError: a file that is missing or empty, a line that is not JSON, a column that is
            missing, a value that is not finite.
    """
    lines = readable(path, "records").read_text().splitlines()
    if not lines:
        raise UserError(f"records: {path} is empty: write it with `tts profile --records`")
    return [_parsed(line, number, path) for number, line in enumerate(lines, 1)]


def _parsed(line: str, number: int, path: str) -> Step:
    where = f"records: line {number} of {path}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object: write it again with `tts profile --records`")
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise UserError(f"{where} has no column {missing[0]}: use a file of `tts profile`")
    for name in COLUMNS:
        if not _finite(row[name]):
            raise UserError(f"{where} holds no number in {name}: remove or mend the line")
    return Step(**{name: row[name] for name in COLUMNS})


def _finite(value: Any) -> bool:
    if isinstance(value, str):
        return True
    try:
        return bool(np.isfinite(np.array(value, dtype=np.float64)).all())
    except (TypeError, ValueError):
        return False


def hidden_file(path: str | Path) -> Path:
    """Where the draft's states of the records in ``path`` lie."""
    return Path(path).with_suffix(".safetensors")


def write_hidden(path: Path, hidden: Sequence[torch.Tensor], draft: str) -> None:
    """Write the states `[cap, width]` of every step, in order; ``draft`` is its fingerprint."""
    save_file({"hidden": torch.stack(list(hidden)).bfloat16()}, hidden_file(path), {"draft": draft})


def read_hidden(path: str, steps: int) -> tuple[torch.Tensor, str]:
    """States `[steps, cap, width]` and the draft's fingerprint.

    Raises:
        UserError: a file that is missing, or belongs to other records.
    """
    file = hidden_file(path)
    try:
        with safe_open(file, "pt") as stored:
            hidden, draft = stored.get_tensor("hidden"), stored.metadata()["draft"]
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise UserError(f"records: cannot read {file} ({error}): profile again") from None
    if len(hidden) != steps:
        raise UserError(
            f"records: {file} holds states of {len(hidden)} steps, {path} has {steps}: profile "
            "again"
        )
    return hidden, draft
