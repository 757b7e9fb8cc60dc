"""Drafts by copying what followed the last time; no model, nothing to train."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tts.drafting.protocol import Draw, Proposal
from tts.policy import Signals
from tts.sampling import Distribution

CERTAIN = 1.0  # all that a copied token says of itself


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """Stands where a draft model would: copy after the longest match, the most recent one.

    Args:
        longest: tokens that are matched at most; shorter matches are tried down to one token.
    """

    longest: int = 3


class PromptLookupDrafter:
    """Proposes the tokens that followed the latest earlier occurrence of the newest ones.

    The proposal is a point mass: `Rejection` accepts a copied token d with probability p(d) and
    otherwise draws from p without d, which keeps the target's law; `Coupled` accepts it where it is
    the target's choice. Where nothing matches, nothing is proposed and the overlap is zero.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, draft: PromptLookup, window: int | None = None) -> None:
        self._window = window  # copy only from the newest so many tokens (None: all)
        # for each n: n-gram -> position after its latest occurrence
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(draft.longest)]
        self._indexed = 0  # occurrences that end at this position or before are known

    def begin(self, warper: Callable[..., Any]) -> None:
        pass

    def prefill(self, sequence: list[int], features: torch.Tensor | None) -> None:
        pass

    def propose(
        self,
        sequence: list[int],
        gamma: int,
        pending: int,
        draw: Draw,
        proceed: Callable[[Signals], bool],
    ) -> Proposal:
        late = self.catch_up(sequence, pending) if pending else None
        tokens: list[int] = []
        said: list[Signals] = []
        start = self._match(sequence, len(sequence))
        for token in [] if start is None else sequence[start : start + gamma]:
            tokens.append(token)
            said.append(Signals(len(said), 0.0, CERTAIN, CERTAIN, token))
            if not proceed(said[-1]):
                break
        q = Distribution(torch.tensor(tokens)[:, None], torch.ones(len(tokens), 1))
        return Proposal(tokens, q if tokens else None, said, late)

    def catch_up(self, sequence: list[int], pending: int) -> Distribution:
        ids, probs = [], []
        for end in range(len(sequence) - pending, len(sequence)):
            start = self._match(sequence, end)
            ids.append(0 if start is None else sequence[start])
            probs.append(0.0 if start is None else 1.0)
        return Distribution(torch.tensor(ids)[:, None], torch.tensor(probs)[:, None])

    def commit(self, length: int, features: torch.Tensor | None) -> None:
        pass  # only committed tokens are ever indexed

    def _match(self, sequence: list[int], end: int) -> int | None:
        """Where the continuation of the longest suffix of ``sequence[:end]`` begins."""
        for stop in range(self._indexed + 1, end):
            for n, latest in enumerate(self._latest, 1):
                if n <= stop:
                    latest[tuple(sequence[stop - n : stop])] = stop
        self._indexed = max(self._indexed, end - 1)
        for n in range(min(len(self._latest), end), 0, -1):
            start = self._latest[n - 1].get(tuple(sequence[end - n : end]))
            if start is not None and (self._window is None or start > end - self._window):
                return start
        return None
