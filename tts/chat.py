"""The pieces of a chat template, so that a conversation can grow without being rendered again.

Rendering the whole history anew would re-tokenize what the model wrote, and the ids could differ
from those in its cache. So the fixed texts between the turns are read off the template once.
"""

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tts.errors import UserError

_MARK = "\u241eturn%d\u241e"  # a text no template contains


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Token ids around the turns: opening USER reply ANSWER next_user USER reply ANSWER ..."""

    opening: list[int]  # before the first user's text, a default system prompt included
    reply: list[int]  # from a user's text to the answer
    next_user: list[int]  # from an answer to the next user's text, end-of-turn token included

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> "ChatFormat":
        """Read the pieces off ``tokenizer``'s chat template.

        Raises:
            UserError: if there is no template, it refuses a system prompt, or it does not keep the
                turns in order.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "target: its tokenizer has no chat template: use an instruction-tuned model, or "
                "give token ids instead of turns"
            )
        messages = [
            {"role": "user", "content": _MARK % 0},
            {"role": "assistant", "content": _MARK % 1},
            {"role": "user", "content": _MARK % 2},
        ]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UserError(f"target: its chat template refuses this dialogue: {error}") from None
        parts = [text]
        for turn in range(3):
            head, mark, tail = parts[-1].partition(_MARK % turn)
            if not mark:
                raise UserError("target: its chat template drops or reorders earlier turns")
            parts[-1:] = [head, tail]
        opening, _, next_user, reply = parts

        def ids(piece: str) -> list[int]:
            return tokenizer(piece, add_special_tokens=False)["input_ids"]

        return cls(ids(opening), ids(reply), ids(next_user))

    def user_turn(self, text_ids: list[int], previous: list[int]) -> list[int]:
        """Ids to append to ``previous`` (all ids so far, perhaps none) for a user's turn.

        An end-of-turn token that the model already wrote is not repeated.
        """
        if not previous:
            return self.opening + text_ids + self.reply
        between = self.next_user
        if between and previous[-1] == between[0]:
            between = between[1:]
        return between + text_ids + self.reply
