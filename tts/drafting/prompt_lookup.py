"""Drafts by copying what followed the last time; where nothing matches, a model may draft."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tts.drafting.protocol import Drafter, Draw, Proposal
from tts.errors import UserError
from tts.policy import Signals
from tts.sampling import Distribution, Warper

MISS = 0.8  # a copy after n matching tokens is taken to fail with MISS ** n, before any was seen
PRIOR, MEMORY = 8, 256  # copies that this counts for; copies over which it is forgotten


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """What is copied; stands where a draft model would, or beside one.

    Args:
        shortest: tokens that have to match; beside a good draft 3, for it does better after fewer.
        longest: tokens that are compared at most: the longest match is copied.

    Raises:
        UserError: for a match of no tokens, or bounds that cross.
    """

    shortest: int = 1
    longest: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise UserError(
                f"lookup: a match of {self.shortest} to {self.longest} tokens is none: use "
                "1 <= shortest <= longest"
            )


class Copy(NamedTuple):
    """A token that followed an earlier occurrence of the newest ones."""

    token: int
    length: int  # tokens that match


NGram = tuple[int, ...]
Overwritten = tuple[dict[NGram, int], NGram, int | None]


class PromptLookupDrafter:
    """Proposes the tokens that followed the latest earlier occurrence of the newest ones.

    A copied token is a point mass: `Rejection` accepts d with probability p(d) and otherwise draws
    from p without d, which keeps the target's law; `Coupled` accepts it where it is the target's
    choice. Whether to copy depends on the tokens before alone. Where nothing matches, ``model``
    drafts until something does; without a model nothing is proposed and the overlap is zero.

    A copied token's confidence is how often such copies held: every committed position tells what
    a copy after a match of its length was worth, whether or not one was drafted.

    Args:
        lookup: what is copied, from anywhere in the text.
        model: the drafter for the rest.
    """

    def __init__(self, lookup: PromptLookup, model: Drafter | None = None) -> None:
        self._lookup, self._model = lookup, model
        self.layers = () if model is None else model.layers
        # for each n: n-gram -> position after its latest occurrence
        self._latest: list[dict[NGram, int]] = [{} for _ in range(lookup.longest)]
        self._copies: list[Copy | None] = []  # what would be copied at each committed position
        self._held = [1 - MISS**n for n in range(1, lookup.longest + 1)]  # share of good copies
        self._seen = [PRIOR] * lookup.longest

    @property
    def hears(self) -> int:
        return 0 if self._model is None else self._model.hears

    def begin(self, warper: Callable[..., Warper]) -> None:
        if self._model is not None:
            self._model.begin(warper)

    def prefill(self, sequence: list[int], features: torch.Tensor | None) -> None:
        if self._model is not None:
            self._model.prefill(sequence, features)

    def at_hand(self, sequence: list[int]) -> float | None:
        self._follow(sequence)
        return self._confidence(self._find(sequence))

    def propose(
        self,
        sequence: list[int],
        gamma: int,
        pending: int,
        draw: Draw,
        proceed: Callable[[Signals], bool],
    ) -> Proposal:
        self._follow(sequence)
        text, copy, going = list(sequence), self._find(sequence), True
        overwritten: list[Overwritten] = []  # drafts can be copied, too, while they stand

        def go_on(newest: Signals) -> bool:
            nonlocal copy, going
            text.append(newest.token)
            overwritten.extend(self._know(text, len(text) - 1))
            copy = self._find(text)
            going = proceed(newest._replace(following=self._confidence(copy)))
            return going

        tokens, parts, said = list[int](), list[Distribution](), list[Signals]()
        if self._model is None or copy is not None:
            late = self.catch_up(sequence, pending) if pending else []
        else:
            made = self._model.propose(
                sequence, gamma, pending, draw, lambda newest: go_on(newest) and copy is None
            )
            late = self._over(made.late, pending)
            tokens, parts, said = made.tokens, made.q, made.signals
            going &= len(text) == len(sequence) + len(tokens)  # a block may end unasked
        while going and len(tokens) < gamma and copy is not None:
            tokens.append(copy.token)
            parts.append(_point(copy))
            held = self._held[copy.length - 1]
            said.append(Signals(len(said), -math.log(held), held, 1.0, copy.token, copied=True))
            if len(tokens) < gamma:
                go_on(said[-1])
        for latest, key, start in reversed(overwritten):
            if start is None:
                del latest[key]
            else:
                latest[key] = start
        return Proposal(tokens, parts, said, late)

    def catch_up(self, sequence: list[int], pending: int) -> list[Distribution]:
        self._follow(sequence)
        if self._model is None or None not in self._copies[-pending:]:
            return [_point(copy) for copy in self._copies[-pending:]]
        return self._over(self._model.catch_up(sequence, pending), pending)

    def commit(self, length: int, features: torch.Tensor | None) -> None:
        if self._model is not None:  # of copies, only committed tokens are ever kept
            self._model.commit(length, features)

    def hear(self, logits: torch.Tensor, first: int) -> None:
        if self._model is not None:
            self._model.hear(logits, first)

    def _over(self, rows: list[Distribution], pending: int) -> list[Distribution]:
        """The model's ``rows`` for the newest positions, with copies in their place."""
        copies = self._copies[len(self._copies) - pending :]
        return [row if c is None else _point(c) for row, c in zip(rows, copies, strict=True)]

    def _confidence(self, copy: Copy | None) -> float | None:
        return None if copy is None else self._held[copy.length - 1]

    def _follow(self, sequence: list[int]) -> None:
        """Take in what was committed, and see what copies of it were worth."""
        for position in range(len(self._copies), len(sequence)):
            copy = self._find(sequence, position)
            self._copies.append(copy)
            if copy is not None:
                n, good = copy.length - 1, copy.token == sequence[position]
                self._seen[n] = min(self._seen[n] + 1, MEMORY)
                self._held[n] += (good - self._held[n]) / self._seen[n]
            self._know(sequence, position)

    def _know(self, text: list[int], end: int) -> list[Overwritten]:
        """Know what follows the n-grams of ``text[:end]``; what was known of them until now."""
        overwritten: list[Overwritten] = []
        for n, latest in enumerate(self._latest[:end], 1):
            key = tuple(text[end - n : end])
            overwritten.append((latest, key, latest.get(key)))
            latest[key] = end
        return overwritten

    def _find(self, text: list[int], end: int | None = None) -> Copy | None:
        """What followed the latest known occurrence of the longest suffix of ``text[:end]``."""
        end = len(text) if end is None else end
        for n in range(min(self._lookup.longest, end), self._lookup.shortest - 1, -1):
            start = self._latest[n - 1].get(tuple(text[end - n : end]))
            if start is not None:
                return Copy(text[start], n)
        return None


def _point(copy: Copy | None) -> Distribution:
    """All mass on the copy; none at all without one."""
    token = 0 if copy is None else copy.token
    return Distribution(np.array([token]), np.array([copy is not None], np.float32))
