"""`tts sweep`: learning settings compared on recorded text, without decoding it again.

The target reads each conversation once; then every setting replays it with the draft alone: each
block is scored by the draft that was live, then learned from, by the coordinator that also runs
while decoding. Time limits are off, so that settings are compared by what they learn.
"""

import itertools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.curves import interval, quotient, worst
from experiments.options import ModelOptions
from experiments.report import number
from experiments.workload import PathFile, RecordedDialogue
from tts.acceptance import on_common_ids, overlap
from tts.cached_model import CHUNK, CachedModel
from tts.chat import ChatFormat
from tts.coordinator import Coordinator
from tts.distill.config import DistillConfig
from tts.distill.learner import teacher_head
from tts.drafting import Memory, make_drafter
from tts.drafting.protocol import TrainableDrafter
from tts.errors import UserError
from tts.evidence import Rows
from tts.models import ModelPair
from tts.sampling import Distribution, Warper
from tts.settings import Sampling

REMEMBERS = "memory."  # what a field of the memory begins with


@dataclass(frozen=True)
class Sweep(ModelOptions):
    """Replay recorded conversations under many learning settings.

    Args:
        path: a file of `tts record`.
        conversations: replay only the first so many (0: all).
        draft_window: sliding window over the context of the draft that learns (None: all of it).
        distill: the settings that do not vary.
        memory: what the draft remembers, where that does not vary (None: nothing).
        draft_updates: False: the draft does not learn, only its memory varies.
        vary: values by field of ``distill``, or of ``memory`` (as ``memory.prior``); all
            combinations are replayed.
        out: JSON lines file to append to, one line a setting ("": none).
    """

    path: str = ""
    conversations: int = 0
    draft_window: int | None = None
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(max_update_share=1.0))
    memory: Memory | None = None
    draft_updates: bool = True
    vary: dict[str, list[Any]] = field(default_factory=dict)
    out: str = ""

    def settings(self) -> list[tuple[dict[str, Any], DistillConfig, Memory | None]]:
        """Every combination, by what is special about it."""
        made = []
        for values in itertools.product(*self.vary.values()):
            special = dict(zip(self.vary, values, strict=True))
            fields = {k: v for k, v in special.items() if not k.startswith(REMEMBERS)}
            others = {k.removeprefix(REMEMBERS): v for k, v in special.items() if k not in fields}
            memory = self.memory
            try:
                if others:
                    memory = replace(memory or Memory(), **others)
                made.append((special, replace(self.distill, **fields), memory))
                if made[-1][1].max_update_share < 1:
                    raise UserError("max_update_share: a replay takes no time to share: use 1")
            except TypeError as error:
                raise UserError(f"vary: {error}: use fields of distill or memory") from None
        return made


@dataclass(frozen=True, slots=True)
class Block:
    """Committed tokens of one answer and what the target says about them."""

    sequence: list[int]  # everything up to and including the block
    rows: Rows
    p: list[Distribution]  # as decoded: warped
    features: torch.Tensor | None  # of every position before the newest, if the draft reads them


def sweep(config: Sweep) -> dict[str, Any]:
    """Replay, print the table, return the JSON summary."""
    if not config.path:
        raise UserError("path: give a file of `tts record`")
    settings = config.settings()
    path = PathFile.read(config.path)
    path.check_target(config, config.compression)
    sampling = Sampling(path.temperature, path.top_k, path.top_p, 0.0, path.repetition_penalty)
    pair = config.load(config.draft, config.compression)
    head = teacher_head(pair.target) if config.draft_updates else None
    size = min(distill.stride for _, distill, _ in settings)
    texts = {
        dialogue.id: read(pair, dialogue, sampling, size)
        for dialogue in track(path.dialogues[: config.conversations or None], "reading")
    }
    static = {name: replay(pair, blocks, sampling, None) for name, blocks in texts.items()}
    lines = []
    for special, distill, memory in track(settings, "replaying"):
        coordinator = None
        if head is not None:
            coordinator = Coordinator(pair.draft, head, distill)
        online = {
            name: replay(pair, blocks, sampling, coordinator, config.draft_window, memory)
            for name, blocks in texts.items()
        }
        kept = {
            "distill": asdict(distill) if config.draft_updates else None,
            "memory": None if memory is None else asdict(memory),
        }
        lines.append(
            {"vary": special, **kept, "thirds": {
                name: {"static": thirds(static[name]), "online": thirds(online[name])}
                for name in texts
            }}
        )  # fmt: skip
        if config.out:
            with Path(config.out).open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    _show(lines)
    return {"path": config.path, "settings": lines}


def read(pair: ModelPair, dialogue: RecordedDialogue, sampling: Sampling, size: int) -> list[Block]:
    """The conversation in blocks of ``size`` generated tokens, read by the target once."""
    chat = ChatFormat.of(pair.tokenizer)
    sequence: list[int] = []
    spans = []
    for user, answer in zip(dialogue.turns, dialogue.answers, strict=True):
        ids = pair.tokenizer(user, add_special_tokens=False)["input_ids"]
        sequence += chat.user_turn(ids, sequence)
        spans += [
            (len(sequence) + i, len(sequence) + min(i + size, len(answer)))
            for i in range(0, len(answer), size)
        ]
        sequence += answer
    cached = CachedModel(pair.target, layers=make_drafter(pair.draft, 0).layers)
    fed = [
        cached.feed(sequence[i : i + CHUNK], keep=len(sequence[i : i + CHUNK]))
        for i in range(0, len(sequence), CHUNK)
    ]
    hidden = torch.cat([rows.hidden for rows in fed])
    features = None
    if fed[0].features is not None:
        features = torch.cat([rows.features for rows in fed])  # type: ignore[misc]
    head = pair.target.get_output_embeddings()
    warp = Warper(sampling, 0)
    blocks = []
    for start, end in spans:
        with torch.no_grad():
            states = hidden[start - 1 : end - 1]
            logits = head(states).float()
        p = warp(logits, sequence, start)
        seen = None if features is None else features[start - 1 : end - 1]
        rows = Rows(start, states, seen)
        blocks.append(
            Block(sequence[:end], rows, p, None if features is None else features[: end - 1])
        )
    return blocks


def replay(
    pair: ModelPair,
    blocks: list[Block],
    sampling: Sampling,
    coordinator: Coordinator | None,
    draft_window: int | None = None,
    memory: Memory | None = None,
) -> list[float]:
    """Overlap at every generated position, each measured before it was learned from."""
    draft = pair.draft if coordinator is None else coordinator.live
    head = pair.target.get_output_embeddings()
    drafter = make_drafter(draft, pair.target.config.vocab_size, draft_window, memory)
    if coordinator is not None:
        lesson = coordinator.lesson(cast(TrainableDrafter, drafter))
    drafter.begin(lambda columns: Warper(sampling, 0, columns))
    values: list[float] = []
    read = 0  # positions whose features the drafter has
    for block in blocks:
        drafter.commit(
            len(block.sequence), None if block.features is None else block.features[read:]
        )
        read = len(block.sequence) - 1
        if memory is not None:
            with torch.no_grad():
                drafter.hear(head(block.rows.hidden), block.rows.first)
        q = drafter.catch_up(block.sequence, len(block.rows))
        values += overlap(on_common_ids(block.p, q))
        if coordinator is not None:
            coordinator.observe(lesson, block.rows, True, 0.0)
            coordinator.update(
                lesson,
                block.sequence,
                len(block.sequence),
                sampling.temperature or 1.0,
            )
    return values


def thirds(values: list[float]) -> list[float]:
    """Mean of each third."""
    return [float(part.mean()) for part in torch.tensor(values).tensor_split(3)]


def _show(lines: list[dict[str, Any]]) -> None:
    table = Table(title="overlap of the draft that was live, relative to the static draft's")
    for column in ("setting", "third 1", "third 2", "third 3", "all", "worst conversation"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for line in lines:
        ratios = [
            [quotient(o, s) for o, s in zip(t["online"], t["static"], strict=True)]
            + [quotient(sum(t["online"]), sum(t["static"]))]
            for t in line["thirds"].values()
        ]
        columns = [interval(column)[0] for column in zip(*ratios, strict=True)]
        name = " ".join(f"{k}={v}" for k, v in line["vary"].items()) or "default"
        least = worst([ratio[-1] for ratio in ratios])
        table.add_row(name, *(number(c, 3) for c in columns), number(least, 3))
    Console(width=140).print(table)
