"""Decode one dialogue with one arm, turn by turn, in one growing context."""

from collections.abc import Callable
from dataclasses import dataclass, field

from controllers.oracle import Oracle
from experiments.options import TextOptions
from experiments.workload import Dialogue, RecordedDialogue
from tts.conversation import Conversation
from tts.engine import SpeculativeDecoder
from tts.records import RoundRecord

OnRound = Callable[[int, RoundRecord], None]  # (turn, record)


@dataclass(slots=True)
class Decoded:
    """What a dialogue became."""

    turns: list[str] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """All generated tokens, turn after turn."""
        return [token for answer in self.answers for token in answer]


def decode(
    decoder: SpeculativeDecoder,
    dialogue: Dialogue | RecordedDialogue,
    text: TextOptions,
    on_round: OnRound | None = None,
    done: Decoded | None = None,
) -> Decoded:
    """Answer the turns until ``max_new_tokens`` are generated or the context is full.

    A `RecordedDialogue` is committed token by token as it was recorded. Each answer is added to
    ``done`` as soon as it is there.
    """
    chat = Conversation(decoder)
    done = done or Decoded()
    context = decoder.pair.target.config.get_text_config().max_position_embeddings
    for index, user in enumerate(dialogue.turns):
        left = text.max_new_tokens - chat.session.generated
        ids = chat.turn(user)
        full = len(chat.session.sequence) + ids.shape[1] + 1 >= context
        if left < 1 or (full and index > 0):  # a first turn that does not fit is an error
            break
        path = dialogue.answers[index] if isinstance(dialogue, RecordedDialogue) else None
        if path is not None and isinstance(decoder.policy, Oracle):
            decoder.policy.follow(chat.session.generated, path)
        result = decoder.generate(
            ids,
            session=chat.session,
            generation_config=text.generation_config(
                min(left, text.turn_tokens if path is None else len(path))
            ),
            seed=text.seed + dialogue.seed,
            path=path,
            on_round=None
            if on_round is None
            else lambda record, turn=index: on_round(turn, record),
        )
        done.turns.append(user)
        done.answers.append(result.tokens)
        done.rounds.extend(result.rounds)
        done.finish_reasons.append(result.finish_reason)
    return done


def recorded(dialogue: Dialogue | RecordedDialogue, done: Decoded) -> RecordedDialogue:
    """The path of ``done``, to be committed again by other arms."""
    return RecordedDialogue(dialogue.id, done.turns, dialogue.seed, done.answers)
