"""A chat whose caches stay warm from turn to turn: long-form means thousands of tokens of context.

chat = Conversation(decoder)
chat.say("Tell me a story.", generation_config=GenerationConfig(max_new_tokens=400))
chat.say("What happened next?", generation_config=GenerationConfig(max_new_tokens=400))
"""

from typing import Any

import torch

from tts.chat import ChatFormat
from tts.engine import GenerationResult, SpeculativeDecoder


class Conversation:
    """Turns of a user and the target, in one `Session`.

    Args:
        decoder: decodes every answer.
        system: system prompt (None: the template's default).

    Raises:
        UserError: if the tokenizer has no chat template that keeps turns in order.
    """

    def __init__(self, decoder: SpeculativeDecoder, system: str | None = None) -> None:
        self._decoder = decoder
        self._tokenizer = decoder.pair.tokenizer
        self._chat = ChatFormat.of(self._tokenizer, system)
        self.session = decoder.session()

    def say(self, text: str, **kwargs: Any) -> GenerationResult:
        """Append a user's turn and decode the answer; ``kwargs`` as for `generate`."""
        return self._decoder.generate(self.turn(text), session=self.session, **kwargs)

    def turn(self, text: str) -> torch.Tensor:
        """Ids `[1, n]` that a user's turn adds to the sequence."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([self._chat.user_turn(ids, self.session.sequence)])
