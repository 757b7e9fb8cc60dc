"""`tts record`: write the tokens of conversations once, so that any later run can commit them."""

from dataclasses import dataclass
from typing import Any

from experiments.arms import build_policy
from experiments.decode import Decoded, decode, recorded
from experiments.live import Live
from experiments.options import ModelOptions, PolicyOptions, TextOptions, check_rule, writable
from experiments.workload import PathFile, RecordedDialogue, dialogues
from tts.acceptance import check_acceptance
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.metrics import LOOP, distinct_4_windows
from tts.records import RoundRecord


@dataclass(frozen=True)
class Record(ModelOptions, TextOptions, PolicyOptions):
    """Write the token path of conversations once.

    Args:
        acceptance: greedy, rejection, block or coupled.
        out: file to write; it must not exist.
    """

    acceptance: str = "coupled"
    out: str = "path.json"
    gamma: int = 0

    def __post_init__(self) -> None:
        TextOptions.__post_init__(self)
        PolicyOptions.__post_init__(self)
        check_acceptance(self.acceptance)
        check_rule(self.acceptance, self.temperature, shared=False)
        if self.policy == "oracle":
            raise UserError("policy: oracle needs the text that is yet to be written: use fixed")


def record(config: Record) -> dict[str, Any]:
    """Decode the workload and write its path after every answer; returns the summary."""
    out = writable(config.out, "out")
    texts = dialogues(config)
    pair = config.load(config.draft, config.compression)
    policy = build_policy(config.policy, config.gamma, pair, config)
    decoder = SpeculativeDecoder(pair, policy=policy, acceptance=config.acceptance)
    written: list[RecordedDialogue] = []
    for text in texts:
        rounds: list[RoundRecord] = []
        done = Decoded()
        try:
            with Live(text.id, config.max_new_tokens) as live:
                observer = _collector(rounds, live)
                decode(decoder, text, config, observer, done)
        finally:  # an interruption loses the answer that it interrupts
            if done.answers:
                written.append(recorded(text, done))
                PathFile(
                    config.target, config.dtype, config.temperature, config.top_p, config.top_k,
                    config.repetition_penalty, written, config.compression, config.seed,
                ).write(out)  # fmt: skip
        windows = distinct_4_windows(done.tokens)
        loops = "  LOOPS" if any(value < LOOP for value in windows) else ""
        shown = " ".join(f"{value:.2f}" for value in windows)
        print(f"{text.id}: {len(done.tokens)} tokens, distinct-4 per 1,000: {shown}{loops}")
    return {"out": str(out), "tokens": sum(len(a) for d in written for a in d.answers)}


def _collector(rounds: list[RoundRecord], live: Live) -> Any:
    def on_round(turn: int, record: RoundRecord) -> None:
        rounds.append(record)
        live.show(rounds)

    return on_round
