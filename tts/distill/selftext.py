"""Let the target write its own training text: whole conversations, many at a time, no prompts.

The chat template's user turn is sampled too, steered by a few opening words, so text costs nothing
but time. All rows have the same length and none is padded: when an answer ends, the next user turn
begins in the same row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tts.attention import whole_steps
from tts.cache import RollbackCache
from tts.cached_model import HeadInput
from tts.chat import ChatFormat
from tts.distill.corpus import Shard
from tts.errors import UserError

OPENERS = """\
Write a Python function that|Write a Python program to|Write a short story about
Continue the story:|Tell me about|Explain how|Explain why|Explain the difference between|What is
What are|Why do|How do I|How can I|How does|Who was|When did|Where is|Can you|Could you explain
Please help me|I need help with|Solve the following problem:|A train leaves|If a shop sells
Calculate|What is the sum of|Find the value|Prove that|Summarize the following text:
Rewrite this sentence:|Correct the grammar:|Translate|Write a letter to|Write an email to my
Write a formal complaint|Write a cover letter for|Write a poem|Write a dialogue between
Write a speech about|Write a product description for|Write a recipe for|Give me a list of
List ten|Give me five ideas for|Give me tips for|Make a plan for|Make a table of|Compare
Describe|Describe a day in the life of|Imagine|Suggest|Recommend|Design|Outline|Create a quiz
What happens next?|Now make it longer.|Go on.|Can you give an example?
Say that in simpler words.|And what about|Now write a test for|Add a second character who
Change the ending so that|Why is that?|Implement a class|Debug this code:
What does this code do?|Write an SQL query|Write a JavaScript function|Write a function in C
Convert|Simplify|How many|Which is better,|What are the advantages of|I am planning a trip to
My friend|Our team|In this essay,|Discuss|Analyze|Argue for|Brainstorm|Teach me"""


@dataclass(frozen=True)
class SelfTextConfig:
    """How the text is sampled.

    Args:
        sequences: rows to write.
        length: tokens a row.
        batch_size: rows written at a time.
        temperature: of the answers.
        user_temperature: of the user turns.
        top_p: nucleus of both, taken within the ``CANDIDATES`` most likely ids.
        max_user: tokens after which a user turn is ended.
        max_answer: tokens after which an answer is ended.
        states: keep the target's final states, 1,152 bytes a token of the default model, so that
            training need not run it again.
        seed: of everything random.
    """

    sequences: int = 1024
    length: int = 512
    batch_size: int = 16
    temperature: float = 0.8
    user_temperature: float = 0.9
    top_p: float = 0.95
    max_user: int = 64
    max_answer: int = 400
    states: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "batch_size", "max_user", "max_answer"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive: use at least 1")
        for name in ("temperature", "user_temperature", "top_p"):
            if not 0 < getattr(self, name) <= 2:
                raise UserError(f"{name}: {getattr(self, name)} is outside (0, 2]")


CANDIDATES = 256


def write_shards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SelfTextConfig
) -> Iterator[Shard]:
    """Yield one shard a batch, with the hidden states that writing it computed anyway."""
    chat = ChatFormat.of(tokenizer)
    openers = [
        tokenizer(opener, add_special_tokens=False)["input_ids"]
        for line in OPENERS.splitlines()
        for opener in line.split("|")
    ]
    random = torch.Generator(model.device).manual_seed(config.seed)
    for start in range(0, config.sequences, config.batch_size):
        rows = min(config.batch_size, config.sequences - start)
        yield _write(model, _Script(chat, openers, rows, config, random), config)


@torch.inference_mode()
def _write(model: PreTrainedModel, script: "_Script", config: SelfTextConfig) -> Shard:
    cache = RollbackCache(model.config, block=whole_steps(config.length))
    opening = script.opening.expand(script.rows, -1)
    tokens, generated = [opening], [torch.zeros_like(opening, dtype=torch.bool)]
    hidden, log_mass = [], []
    step = opening
    for _ in range(config.length - opening.shape[1]):
        with HeadInput(model) as head:
            logits = model(
                input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
        if config.states:
            hidden.append(head.hidden[:, -1])
        log_mass.append((logits.float() / config.temperature).logsumexp(-1))
        step, answered = script.next(_sample(logits, script.temperature, config.top_p, script))
        step = step[:, None]
        tokens.append(step)
        generated.append(answered[:, None])
    counts = torch.cat(generated, 1)[:, 1:]
    asked = counts[:, opening.shape[1] - 1 :]  # rows before have no hidden state, and count not
    return Shard(
        torch.cat(tokens, 1),
        counts,
        torch.stack(log_mass, 1)[asked],
        torch.stack(hidden, 1)[asked] if config.states else None,
    )


def _sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: float, script: "_Script"
) -> torch.Tensor:
    best = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
    probs = (best.values.float() / temperature[:, None]).softmax(-1)
    probs[probs.cumsum(-1) - probs >= top_p] = 0.0
    choice = probs.multinomial(1, generator=script.random)
    return best.indices.gather(1, choice)[:, 0]


class _Script:
    """Whose turn it is in each row, and the template tokens that are forced in between."""

    def __init__(
        self,
        chat: ChatFormat,
        openers: list[list[int]],
        rows: int,
        config: SelfTextConfig,
        random: torch.Generator,
    ) -> None:
        device = random.device
        self.rows, self.random, self._config = rows, random, config
        self.opening = torch.tensor(chat.opening, device=device)
        self._end = chat.next_user[0]
        # forced after a turn's end token; next_user is followed by an opener, one in ten by none
        self._reply = _padded([chat.reply[1:]], device)
        self._openers = _padded(openers + [[]] * (len(openers) // 9), device)
        self._next_user = torch.tensor(chat.next_user[1:], device=device)
        self._is_user = torch.ones(rows, dtype=torch.bool, device=device)
        self._spoken = torch.zeros(rows, dtype=torch.long, device=device)
        width = len(self._next_user) + self._openers.shape[1] + self._reply.shape[1]
        self._queue = torch.full((rows, width), -1, device=device)
        self._queue[:, : self._openers.shape[1]] = self._random_openers(rows)

    @property
    def temperature(self) -> torch.Tensor:
        """Of each row's next token, `[rows]`."""
        config = self._config
        return torch.where(self._is_user, config.user_temperature, config.temperature)

    def next(self, sampled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace forced tokens in ``sampled`` [rows] and say which ones are answers."""
        forced = self._queue[:, 0] >= 0
        token = torch.where(forced, self._queue[:, 0], sampled)
        self._queue = self._queue.roll(-1, 1)
        self._queue[:, -1] = -1
        self._spoken += ~forced
        limit = torch.where(self._is_user, self._config.max_user, self._config.max_answer)
        token = torch.where(~forced & (self._spoken >= limit), self._end, token)
        ended = ~forced & (token == self._end)
        answered = ~forced & ~self._is_user
        self._queue = torch.where(ended[:, None], self._follow(), self._queue)
        self._spoken = torch.where(ended, 0, self._spoken)
        self._is_user = self._is_user ^ ended
        return token, answered

    def _follow(self) -> torch.Tensor:
        """What is forced in each row if its turn ends now, `[rows, width]`."""
        follow = torch.full_like(self._queue, -1)
        follow[:, : self._reply.shape[1]] = self._reply
        user = torch.full_like(self._queue, -1)
        head = len(self._next_user)
        user[:, :head] = self._next_user
        user[:, head : head + self._openers.shape[1]] = self._random_openers(self.rows)
        return torch.where(self._is_user[:, None], follow, user)

    def _random_openers(self, rows: int) -> torch.Tensor:
        pick = torch.randint(
            len(self._openers), (rows,), generator=self.random, device=self.random.device
        )
        return self._openers[pick]


def _padded(lists: list[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, lists))
    return torch.tensor([x + [-1] * (width - len(x)) for x in lists], device=device)
