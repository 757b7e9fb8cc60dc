"""What is decoded: conversations of many user turns, and the recorded token paths of them.

A conversation file is JSON: ``{"conversations": [{"id": ..., "turns": ["user text", ...]}]}``, or
one ``{"turns": [...]}`` a line, as in Spec-Bench (whose ``question_id`` will do). A path file
adds the tokens that answered each turn.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from experiments.options import SamplingOptions, TargetOptions, TextOptions, readable
from tts.errors import UserError

FOLDER = Path(__file__).parent / "workload"
SHIPPED = ("tune", "judge", "single", "tasks")
FILES = {"single": "single_subject.json", "tasks": "tasks.json"}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """User turns, and the seed that is added to the run's."""

    id: str
    turns: list[str]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RecordedDialogue:
    """The answers' tokens of one dialogue; ``answers[i]`` follows ``turns[i]``."""

    id: str
    turns: list[str]
    seed: int
    answers: list[list[int]]


@dataclass(frozen=True, slots=True)
class PathFile:
    """Recorded dialogues and the settings they were decoded with."""

    target: str
    dtype: str
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    dialogues: list[RecordedDialogue]
    compression: str = "none"  # of the target that wrote it
    seed: int = 0  # of the run

    def write(self, file: Path) -> None:
        """Atomically."""
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)) + "\n")
        partial.rename(file)

    @classmethod
    def read(cls, path: str) -> "PathFile":
        """Raise UserError for a file that is missing or was not written by `tts record`."""
        file = readable(path, "path")
        try:
            fields = json.loads(file.read_text())
            dialogues = [RecordedDialogue(**d) for d in fields.pop("dialogues")]
            for d in dialogues:
                if len(d.turns) != len(d.answers):
                    raise ValueError(f"{d.id}: {len(d.turns)} turns, {len(d.answers)} answers")
                if not all(isinstance(x, int) for x in (d.seed, *chain(*d.answers))):
                    raise ValueError(f"{d.id}: a seed or a token is no whole number")
            if not dialogues or not all(d.answers and all(d.answers) for d in dialogues):
                raise ValueError("a dialogue or an answer is empty")
            made = cls(dialogues=dialogues, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"path: {path!r} is not a recorded path ({error}): make one with `tts record`"
            ) from None
        _check_ids(dialogues)
        return made

    def check_target(self, options: TargetOptions, compression: str | None = None) -> None:
        """Tokens, and what is said of them, are of one target (None: however compressed)."""
        if self.target != options.target:
            raise UserError(
                f"target: {options.target!r} did not write this path, {self.target!r} did"
            )
        if compression not in (None, self.compression):
            raise UserError(
                f"compression: {compression} is not the {self.compression} that the path "
                "was recorded with: record one of its own"
            )

    def check_text(self, sampling: SamplingOptions) -> None:
        """Paired arms must draft with the noise and the warping that the path was drawn with."""
        for field in ("temperature", "top_p", "top_k", "repetition_penalty", "seed"):
            if getattr(self, field) != getattr(sampling, field):
                raise UserError(
                    f"{field}: {getattr(sampling, field)} is not the {getattr(self, field)} that "
                    "the path was recorded with: use the same"
                )


def dialogues(options: TextOptions) -> list[Dialogue]:
    """The dialogues that ``options.workload`` names.

    Raises:
        UserError: a file that is missing, empty, or not JSON of the form above.
    """
    name = options.workload
    if name in SHIPPED:
        file = FOLDER / FILES.get(name, "conversations.json")
        found = [d for d in _parse(file) if name in FILES or d["split"] == name]
    else:
        found = _parse(readable(name, "workload"))
    made = [
        Dialogue(str(d.get("id", d.get("question_id", i))), d["turns"], d.get("seed", i))
        for i, d in enumerate(found)
    ]
    _check_ids(made)
    return made[: options.conversations or None]


def _check_ids(found: Sequence[Dialogue | RecordedDialogue]) -> None:
    """Raise UserError if two are called alike: what is measured is kept by these names."""
    name, count = Counter(d.id for d in found).most_common(1)[0]
    if count > 1:
        raise UserError(f"id: {count} conversations are called {name!r}: rename all but one")


def _parse(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text()
    except UnicodeDecodeError:
        raise UserError(f"workload: {file} is not text in UTF-8: save it as such") from None
    if not text.strip():
        raise UserError(f"workload: {file} is empty: give at least one conversation")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise UserError(f"workload: {file} is not JSON ({whole})") from None
    if isinstance(data, dict):
        data = data.get("conversations") or data.get("prompts") or [data]
    if not isinstance(data, list) or not data:
        raise UserError(f"workload: {file} holds no conversation")
    for entry in data:
        turns = entry.get("turns") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
            raise UserError(f'workload: {file} has an entry without "turns": [user text, ...]')
        if not isinstance(entry.get("seed", 0), int):
            raise UserError(f"workload: {file} has a seed {entry['seed']!r}: use a whole number")
    return data
