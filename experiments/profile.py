"""`tts profile`: what a pass costs, and with --records what every gamma would have given.

Passes are timed by rows and context, beside the floor of memory bandwidth. Step records are taken
at every compression of the target in turn (see `experiments.steps`).
"""

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from controllers import make_policy
from experiments import steps
from experiments.collect import collect
from experiments.options import WINDOW, ModelOptions, TextOptions, writable
from experiments.report import number
from experiments.signals import show_signals, signal_summary
from experiments.workload import dialogues
from tts.cached_model import CachedModel
from tts.compression import COMPRESSION, check_compression
from tts.drafting import Memory, make_drafter
from tts.errors import UserError
from tts.fingerprint import model_fingerprint
from tts.models import PROMPT_LOOKUP, ModelPair
from tts.sampling import Distribution, Warper
from tts.settings import Sampling


@dataclass(frozen=True)
class Profile(ModelOptions, TextOptions):
    """Time passes of target and draft by number of rows and context, or write step records.

    Args:
        contexts: tokens before the pass.
        rows: tokens in a pass; gamma drafts are verified by gamma + 1.
        repeats: passes each; their median is shown.
        records: file of step records to write instead; it must not exist. The workload is decoded,
            the shipped one of four tasks by default.
        compressions: of the target, each of which decodes the whole workload.
        cap: tokens drafted at every state.
        memory: what the draft of the records is reminded of (None: nothing).
        window: sliding window over the draft's context.
    """

    workload: str = "tasks"
    conversations: int = 0
    max_new_tokens: int = 72

    contexts: tuple[int, ...] = (500, 2000, 6000)
    rows: tuple[int, ...] = (1, 2, 3, 5, 9)
    repeats: int = 15
    records: str = ""
    compressions: tuple[str, ...] = COMPRESSION
    cap: int = 8
    memory: Memory | None = None
    window: int = WINDOW

    @property
    def gammas(self) -> tuple[int, ...]:
        """Lengths whose verification is timed."""
        return tuple(rows - 1 for rows in self.rows if rows > 1 and 1 in self.rows)

    def __post_init__(self) -> None:
        TextOptions.__post_init__(self)
        make_policy("svip", cap=self.cap)
        if self.records and self.draft == PROMPT_LOOKUP:
            raise UserError(f"draft: {self.draft} has no states to record: give a model")
        if not self.contexts or not self.rows or not self.compressions:
            raise UserError("contexts, rows, compressions: name at least one of each")
        for compression in self.compressions:
            check_compression(compression)
        if min((*self.contexts, *self.rows, self.repeats)) < 1:
            raise UserError("contexts, rows, repeats: use positive numbers")


def profile(config: Profile) -> dict[str, Any]:
    """Measure, print, return the JSON summary."""
    if config.records:
        return _records(config)
    pair = config.load(config.draft, config.compression)
    bandwidth = read_bandwidth(pair.target.device)
    verify: dict[int, dict[int, float]] = {}
    draft: dict[int, dict[int, float]] = {}
    for context in config.contexts:
        verify[context] = _passes(CachedModel(pair.target), context, config.rows, config.repeats)
        draft[context] = _proposals(pair, context, config.gammas, config.repeats, config.window)
    floor_ms = 1000 * weight_bytes(pair) / bandwidth
    summary = {
        "bandwidth_gb_s": bandwidth / 1e9,
        "weight_floor_ms": floor_ms,
        "verify_ms": verify,
        "draft_ms": draft,
        "context_cost": _context_cost(pair, verify, bandwidth),
        "load": os.getloadavg()[0],
    }
    _show(config, summary)
    return summary


def _records(config: Profile) -> dict[str, Any]:
    """Write the step records of every compression; print what their signals are worth."""
    file = writable(config.records, "records")
    prompts, written, states = dialogues(config), [], []
    for compression in config.compressions:
        pair = config.load(config.draft, compression)
        for step, hidden in collect(
            pair, prompts, config, config.cap, config.memory, config.window
        ):
            steps.append(file, step)
            written.append(step)
            states.append(hidden)
    if not written:
        raise UserError(f"max_new_tokens: {config.max_new_tokens} leave no step of {config.cap}")
    steps.write_hidden(file, states, model_fingerprint(pair.draft_model))
    summary = signal_summary(written)
    show_signals(summary)
    return {"records": str(file), "load": os.getloadavg()[0]} | summary


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which a buffer far larger than any cache is read, the best of some sums."""
    buffer = torch.ones(2**30 // 4, device=device)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - began)
    return buffer.numel() * 4 / best


def weight_bytes(pair: ModelPair) -> int:
    """Bytes of target weights that a pass reads; a tied embedding is read once, as the head."""
    seen = {p.data_ptr(): p.numel() * p.element_size() for p in pair.target.parameters()}
    embedding = pair.target.get_input_embeddings().weight
    head = pair.target.get_output_embeddings().weight
    if head.data_ptr() != embedding.data_ptr():
        seen.pop(embedding.data_ptr())
    return sum(seen.values())


def _passes(
    cached: CachedModel, context: int, rows: tuple[int, ...], repeats: int
) -> dict[int, float]:
    """Median milliseconds of a pass of each number of rows; row counts take turns."""
    random = torch.Generator().manual_seed(0)
    size = cached.model.config.get_text_config().vocab_size
    tokens = torch.randint(0, size, (context + max(rows),), generator=random).tolist()
    cached.feed(tokens[:context])
    times: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(repeats + 2):
        for count in rows:
            began = time.perf_counter()
            cached.feed(tokens[context : context + count], keep=count).logits.sum().item()
            times[count].append(1000 * (time.perf_counter() - began))
            cached.rollback(context)
    return {count: statistics.median(values[2:]) for count, values in times.items()}


def _proposals(
    pair: ModelPair, context: int, gammas: tuple[int, ...], repeats: int, window: int
) -> dict[int, float]:
    """Median milliseconds to draft so many tokens after another one was committed."""
    size = pair.target.config.get_text_config().vocab_size
    drafter = make_drafter(pair.draft, size, window)
    target = CachedModel(pair.target, layers=drafter.layers)
    random = torch.Generator().manual_seed(0)
    rounds = (repeats + 2) * len(gammas)
    tokens = torch.randint(0, size, (context + rounds,), generator=random).tolist()
    greedy = Sampling(0.0, 0, 1.0, 0.0, 1.0)
    drafter.begin(lambda columns: Warper(greedy, 0, columns))
    drafter.prefill(tokens[:context], target.feed(tokens[: context - 1]).features)
    times: dict[int, list[float]] = {gamma: [] for gamma in gammas}
    for index in range(rounds):
        length = context + index
        sequence = tokens[:length]
        began = time.perf_counter()
        # a distribution's first id is its most probable one at temperature 0
        drafter.propose(sequence, gammas[index % len(gammas)], 0, _first, lambda said: True)
        times[gammas[index % len(gammas)]].append(1000 * (time.perf_counter() - began))
        drafter.commit(length + 1, target.feed(tokens[length - 1 : length]).features)
    return {gamma: statistics.median(values[2:]) for gamma, values in times.items()}


def _first(q: Distribution, position: int) -> int:
    return int(q.ids[q.probs.argmax()])


def _context_cost(
    pair: ModelPair, verify: dict[int, dict[int, float]], bandwidth: float
) -> dict[str, Any]:
    """Extra time of the longest context over the shortest / time to read the extra keys, values."""
    config = pair.target.config.get_text_config()
    low, high = min(verify), max(verify)
    size = next(iter(pair.target.parameters())).element_size()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    read_ms = 1000 * (high - low) * per_token / bandwidth
    return {
        "from": low,
        "to": high,
        "read_ms": read_ms,
        "ratio": {
            rows: (verify[high][rows] - verify[low][rows]) / read_ms if read_ms else None
            for rows in verify[low]
        },
    }


def _show(config: Profile, summary: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"read bandwidth {summary['bandwidth_gb_s']:.1f} GB/s; weights of the target alone need "
        f"{summary['weight_floor_ms']:.1f} ms a pass; load {summary['load']:.1f}"
    )
    table = Table(
        title="milliseconds a pass (median), and the acceptance a token at which gamma drafts "
        "break even"
    )
    verify, draft = summary["verify_ms"], summary["draft_ms"]
    table.add_column("context")
    for context in verify:
        table.add_column(str(context), justify="right")
    for rows in config.rows:
        table.add_row(f"target, rows {rows}", *(number(ms[rows], 1) for ms in verify.values()))
    for gamma in config.gammas:
        table.add_row(f"draft, gamma {gamma}", *(number(ms[gamma], 2) for ms in draft.values()))
    for gamma in config.gammas:
        even = (_break_even(gamma, draft[context][gamma], verify[context]) for context in verify)
        table.add_row(f"even at gamma {gamma}", *(number(a, 2) for a in even))
    console.print(table)
    cost = summary["context_cost"]
    if cost["read_ms"]:
        ratios = ", ".join(f"{rows} rows {ratio:.1f}" for rows, ratio in cost["ratio"].items())
        console.print(
            f"context {cost['from']} to {cost['to']}: reading the extra keys and values takes "
            f"{cost['read_ms']:.1f} ms; the passes take this many times longer: {ratios}"
        )


def _break_even(gamma: int, draft_ms: float, verify: dict[int, float]) -> float | None:
    """Per-token acceptance a at which gamma drafts pay: a + ... + a^gamma = their extra cost.

    None where they would not pay if all were accepted.
    """
    extra = (draft_ms + verify[gamma + 1]) / verify[1] - 1
    if extra > gamma:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**i for i in range(1, gamma + 1)) < extra:
            low = middle
        else:
            high = middle
    return high
