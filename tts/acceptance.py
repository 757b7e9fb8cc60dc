"""The laws by which drafted tokens are accepted, and what the target and a draft share.

The rules are lossless for whatever the draft proposes, given the distribution that each token was
really drawn from.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tts.errors import UserError
from tts.sampling import Distribution

FEW = 256  # ids up to which plain floats are faster than arrays
BITS = 2**64 - 1


class Common(NamedTuple):
    """What p and q say of the ids that p lists."""

    ids: NDArray[np.int64]  # [n]
    p: NDArray[np.float32]  # [n]
    q: NDArray[np.float32]  # [n]


def on_common_ids(p: Iterable[Distribution], q: Iterable[Distribution]) -> list[Common]:
    """What p and q say of the ids that p lists, row by row."""
    return [Common(*mine, other.over(mine.ids)) for mine, other in zip(p, q, strict=True)]


def overlap(common: Sequence[Common]) -> list[float]:
    """sum_x min(p(x), q(x)) of each row: the acceptance probability under `rejection`."""
    return [float(np.minimum(p, q).sum()) for _, p, q in common]


def match_probability(common: Sequence[Common]) -> list[float]:
    """Probability that `Coupled` draws the same token from both, of each row.

    sum_x 1 / sum_y max(p(y)/p(x), q(y)/q(x)), over x in both supports (Daliri, Musco, Suresh 2024).
    In the order of rising q/p the maximum is p's for every y up to x and q's for every y after it,
    so two running sums do for all x: it is p q / (p-mass up to x * q + q-mass after x * p).
    """
    return [_match(p.tolist(), q.tolist()) if len(p) <= FEW else _match_many(p, q)
            for _, p, q in common]  # fmt: skip


def _match_many(p: NDArray[Any], q: NDArray[Any]) -> float:
    both = (p > 0) & (q > 0)
    alone = p[~both].sum()
    p, q = p[both].astype(float), q[both].astype(float)
    order = (q / p).argsort()
    p, q = p[order], q[order]
    after = (1 - q.cumsum()).clip(min=0)
    return float((q / ((alone + p.cumsum()) * (q / p) + after)).sum())


def _match(p: list[float], q: list[float]) -> float:
    """The same for few ids, of which most have one of the two only."""
    both = sorted((y / x, x, y) for x, y in zip(p, q, strict=True) if x and y)
    before, after, total = sum(p) - sum(x for _, x, _ in both), 1.0, 0.0
    for ratio, x, y in both:
        before, after = before + x, after - y
        total += y / (before * ratio + max(after, 0.0))
    return total


class Verdict(NamedTuple):
    """What a verification pass decided."""

    num_accepted: int  # drafts kept, from the front
    token: int  # the target's token after them: correction or bonus
    mismatches: int = 0  # committed tokens that are not the pass's own choice (recorded paths)


class AcceptanceRule(Protocol):
    """How tokens are drawn from the draft, and which of them the target keeps."""

    def draw(self, q: Distribution, position: int) -> int:
        """A token from ``q`` for absolute ``position``."""
        ...

    def judge(
        self, p: list[Distribution], q: list[Distribution], drafts: list[int], first: int
    ) -> Verdict:
        """Accept a prefix of ``drafts`` and choose the token after it.

        Args:
            p: the target's rows for drafts 0..g-1 and the row after the last, `g + 1` rows.
            q: the rows the drafts were drawn from, `g` rows.
            drafts: the `g` drafted tokens.
            first: absolute position of the first draft.
        """
        ...

    def probability(self, common: Sequence[Common], drafts: Sequence[int]) -> list[float]:
        """That a token drawn from each row of q is kept, given that those before it are.

        Args:
            common: p and q, see `on_common_ids`.
            drafts: the tokens that were drawn.
        """
        ...


class Rejection:
    """Accept with min(1, p/q), else draw from (p - q)+ (Leviathan et al. 2023).

    The random numbers come from one generator, so the text depends on draft and lengths, its law
    does not.

    Args:
        seed: of the generator,
        start: with the absolute position of the first token, so that turns of a conversation
            differ.
    """

    def __init__(self, seed: int, start: int = 0) -> None:
        self._random = np.random.default_rng((seed & BITS, start))

    def draw(self, q: Distribution, position: int) -> int:
        return self._choose(q.ids, q.probs)

    def judge(
        self, p: list[Distribution], q: list[Distribution], drafts: list[int], first: int
    ) -> Verdict:
        for j, token in enumerate(drafts):
            if self._random.random() >= p[j].of(token) / q[j].of(token):
                residual = (p[j].probs - q[j].over(p[j].ids)).clip(min=0)
                return Verdict(j, self._rest(p[j], residual))
        return Verdict(len(drafts), self._choose(*p[-1]))

    def probability(self, common: Sequence[Common], drafts: Sequence[int]) -> list[float]:
        return overlap(common)

    def _rest(self, p: Distribution, left: NDArray[np.float32]) -> int:
        """A token by what is ``left`` of ``p``; nothing is where q is p but for rounding."""
        return self._choose(p.ids, left if left.any() else p.probs)

    def _choose(self, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> int:
        cumulative = weights.cumsum(dtype=float)
        point = self._random.random() * cumulative[-1]
        # side="right": a point of exactly zero must not fall on an id of zero weight
        return int(ids[np.searchsorted(cumulative, point, side="right")])


class Block(Rejection):
    """Verify the block as a whole (Sun et al. 2024): the highest acceptance there is.

    A token that the target likes more than the draft does makes up for one before it. With r_0 = 1
    and r_i = min(1, r_(i-1) p(x_i) / q(x_i)), at least i of the drafts are kept with probability
    r_i; token by token it would be the product of every min(1, p/q). Going back from the last
    draft, the block is cut after i of them with probability

        r_i at its end,   m / (m + 1 - r_i) before that,   m = sum_x (r_i p(x) - q(x))+

    and the token after them is drawn from p, or from (r_i p - q)+. Where a block ends may depend on
    all of its tokens, as under `Rejection`.
    """

    def judge(
        self, p: list[Distribution], q: list[Distribution], drafts: list[int], first: int
    ) -> Verdict:
        common = on_common_ids(p[:-1], q)
        *reach, whole = _reach(common, drafts)
        if self._random.random() < whole:
            return Verdict(len(drafts), self._choose(*p[-1]))
        for j, kept in reversed(list(enumerate(reach))):
            left = (kept * common[j].p - common[j].q).clip(min=0)
            mass = float(left.sum())
            if j == 0 or self._random.random() * (mass + 1 - kept) < mass:
                break
        return Verdict(j, self._rest(p[j], left))

    def probability(self, common: Sequence[Common], drafts: Sequence[int]) -> list[float]:
        reach = _reach(common, drafts)[:-1]
        rows = zip(reach, common, strict=True)
        return [float(np.minimum(row.p, row.q / kept).sum()) for kept, row in rows]


def _reach(common: Sequence[Common], drafts: Sequence[int]) -> list[float]:
    """r_0, r_1, ... of `Block`, one more than there are ``drafts``."""
    reach = [1.0]
    for (ids, p, q), token in zip(common, drafts, strict=True):
        here = ids == token
        ratio = float(p[here].sum() / q[here].sum()) if here.any() else 0.0
        reach.append(min(1.0, reach[-1] * ratio))
    return reach


class Coupled:
    """Draft and target share their noise, so the text is the target's own seeded path.

    Both emit argmin_x E_x / prob(x) with E_x ~ Exp(1) keyed by (seed, absolute position, x)
    (Daliri, Musco, Suresh 2024): whatever the drafter, gamma, stop rule or update, the tokens are
    those of gamma = 0, as long as the target's probabilities are. At temperature 0 this is greedy
    decoding.
    """

    def __init__(self, seed: int, start: int = 0) -> None:
        self._seed = seed  # positions key the noise

    def draw(self, q: Distribution, position: int) -> int:
        noise = exponential_noise(self._seed, position, q.ids)
        with np.errstate(divide="ignore"):  # banned ids
            return int(q.ids[(noise / q.probs).argmin()])

    def judge(
        self, p: list[Distribution], q: list[Distribution], drafts: list[int], first: int
    ) -> Verdict:
        choices = self.choices(p, first)
        accepted = _common_prefix(drafts, choices)
        return Verdict(accepted, choices[accepted])

    def probability(self, common: Sequence[Common], drafts: Sequence[int]) -> list[float]:
        return match_probability(common)

    def choices(self, p: list[Distribution], first: int) -> list[int]:
        """The target's token for each row of ``p``, at positions ``first``, ``first`` + 1, ..."""
        return [self.draw(row, first + j) for j, row in enumerate(p)]


class Recorded:
    """Commits a recorded token path, whatever the pass would have chosen.

    Where the target's logits depend on the number of rows in a pass (INT8, NF4, a GPU), paired arms
    can only share their text by force: drafts are accepted where they equal the path, and what the
    pass would have chosen otherwise is counted.

    Args:
        path: tokens of this generation; ``path[0]`` stands at absolute position ``start``.
        rule: draws the drafts and knows the pass's own choices.
    """

    def __init__(self, path: list[int], start: int, rule: Coupled) -> None:
        self._path, self._start, self._rule = path, start, rule

    def draw(self, q: Distribution, position: int) -> int:
        return self._rule.draw(q, position)

    def judge(
        self, p: list[Distribution], q: list[Distribution], drafts: list[int], first: int
    ) -> Verdict:
        path = self._path[first - self._start :]
        accepted = _common_prefix(drafts, path)
        own = self._rule.choices(p[: accepted + 1], first)
        mismatches = sum(a != b for a, b in zip(own, path, strict=False))
        return Verdict(accepted, path[accepted], mismatches)

    def probability(self, common: Sequence[Common], drafts: Sequence[int]) -> list[float]:
        return self._rule.probability(common, drafts)


# by the name that is asked for; "greedy" is what all of them are at temperature 0
RULES: dict[str, Callable[[int, int], AcceptanceRule]] = {
    "rejection": Rejection, "block": Block, "coupled": Coupled
}  # fmt: skip
ACCEPTANCE = ("greedy", *RULES)


def check_acceptance(name: str) -> None:
    """Raise UserError for an unknown rule."""
    if name not in ACCEPTANCE:
        raise UserError(f"acceptance: {name!r} is not one of {', '.join(ACCEPTANCE)}")


def _common_prefix(drafts: list[int], tokens: list[int]) -> int:
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == tokens[accepted]:
        accepted += 1
    return accepted


def exponential_noise(
    seed: int, position: int | NDArray[np.uint64], ids: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Exp(1) noise for (seed, position, token id), never zero, of the broadcast shape.

    A hash instead of a generator: nothing of vocabulary size is kept, and a rejected tail cannot
    shift the noise of later positions.
    """
    bits = _mix(_mix(_mix(seed & BITS) ^ position) ^ ids.view(np.uint64))
    # 52 bits, so that adding a half is exact and u lies strictly between 0 and 1
    uniform = ((bits >> 12) + 0.5) * 2.0**-52
    return -np.log(uniform)


def _mix(x: Any) -> Any:
    """The finalizer of SplitMix64, a bijection of 64-bit integers: of one, or of an array."""
    x = (x + 0x9E3779B97F4A7C15) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)
