"""Arms that take turns on the same recorded paths.

Every arm commits a path's tokens, a few dozen of them at a time, so that a machine whose speed
drifts slows all alike; what an arm learns and caches stays its own.
"""

import sys
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from controllers.oracle import Oracle
from experiments.options import AmountOptions
from experiments.workload import RecordedDialogue
from tts.conversation import Conversation
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.records import RoundRecord

Rounds = dict[str, dict[str, list[RoundRecord]]]  # arm -> conversation -> rounds
OnPart = Callable[[str, RecordedDialogue, list[RoundRecord]], None]


def check_segment(tokens: int) -> None:
    """Raise UserError for a segment in which nothing is decoded: its first token is given."""
    if tokens < 2:
        raise UserError(f"segment_tokens: {tokens} is too short: use at least 2")


def take_turns(
    arms: Mapping[str, SpeculativeDecoder],
    dialogues: list[RecordedDialogue],
    text: AmountOptions,
    size: int,
    on_part: OnPart,
) -> Rounds:
    """The rounds of every arm on every dialogue.

    Args:
        arms: by name.
        dialogues: what all of them commit.
        text: how many tokens, with which warping.
        size: tokens of a turn.
        on_part: called with every turn's rounds.
    """
    rounds: Rounds = {name: {} for name in arms}
    random = np.random.default_rng(text.seed)
    for dialogue in dialogues:
        turns = {name: _segments(arm, dialogue, text, size) for name, arm in arms.items()}
        while turns:
            # a new order every time: what the machine does at intervals meets all arms alike
            for name in random.permutation(list(turns)).tolist():
                part = next(turns[name], None)
                if part is None:
                    del turns[name]
                    continue
                rounds[name].setdefault(dialogue.id, []).extend(part)
                on_part(name, dialogue, part)
        print(f"{dialogue.id}: {len(arms)} arms", file=sys.stderr)
    return rounds


def _segments(
    decoder: SpeculativeDecoder, dialogue: RecordedDialogue, text: AmountOptions, size: int
) -> Iterator[list[RoundRecord]]:
    """The rounds of each segment; a segment's first token but a turn's is given, not decoded."""
    chat = Conversation(decoder)
    left = text.max_new_tokens
    for user, answer in zip(dialogue.turns, dialogue.answers, strict=True):
        prompt = chat.turn(user)
        for index, path in enumerate(_cut(answer, size)):
            if left < 1:
                return
            if index:
                prompt, path = torch.tensor([path[:1]]), path[1:]
            if isinstance(decoder.policy, Oracle):
                decoder.policy.follow(chat.session.generated, path)
            result = decoder.generate(
                prompt,
                session=chat.session,
                generation_config=text.generation_config(min(left, len(path))),
                seed=text.seed + dialogue.seed,
                path=path,
            )
            left -= len(result.tokens)
            yield result.rounds


def _cut(answer: list[int], size: int) -> list[list[int]]:
    """Pieces of ``size`` tokens; the last one may be longer by a token, but is no single one."""
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [pieces[-2] + pieces[-1]]
    return pieces
