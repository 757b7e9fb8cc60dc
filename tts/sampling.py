"""From logits to distributions, and the laws by which drafted tokens are accepted.

One function warps the logits of target and draft alike, in transformers' order. Distributions are
kept as the ids that survived the truncation and their probabilities; the acceptance rules are
lossless for whatever the draft proposes, given the distribution each token was really drawn from.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from tts.settings import Sampling

CANDIDATES = 256  # ids looked at first when truncating; nearly always enough, else 16 times more


@dataclass(frozen=True, slots=True)
class Distribution:
    """Probabilities of a few ids a row; ids that are not listed have probability zero."""

    ids: torch.Tensor  # int64 [rows, n]; an id may come again with probability zero
    probs: torch.Tensor  # float32 [rows, n], each row sums to one

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Distribution":
        return Distribution(self.ids[rows], self.probs[rows])

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Probabilities of ``ids`` [rows, m] in each row, `[rows, m]`."""
        size = 1 + max(int(self.ids.max()), int(ids.max()))
        dense = self.probs.new_zeros(len(self), size).scatter_add_(1, self.ids, self.probs)
        return dense.gather(1, ids)


def join(parts: list[Distribution]) -> Distribution:
    """Stack rows; shorter ones are filled up with their first id at probability zero."""
    width = max(part.ids.shape[1] for part in parts)
    ids, probs = [], []
    for part in parts:
        missing = width - part.ids.shape[1]
        ids.append(torch.cat([part.ids, part.ids[:, :1].expand(-1, missing)], 1))
        probs.append(torch.nn.functional.pad(part.probs, (0, missing)))
    return Distribution(torch.cat(ids), torch.cat(probs))


def on_common_ids(p: Distribution, q: Distribution) -> torch.Tensor:
    """What p and q say of the ids that p lists, `[2, rows, n]`; each id counts once."""
    return torch.stack([p.probs, q.of(p.ids) * (p.probs > 0)])


def overlap(common: torch.Tensor) -> torch.Tensor:
    """sum_x min(p(x), q(x)) of each row `[rows]`: the acceptance probability under `rejection`.

    Args:
        common: from `on_common_ids`.
    """
    return common.amin(0).sum(-1)


def match_probability(common: torch.Tensor) -> torch.Tensor:
    """Probability that `Coupled` draws the same token from both, of each row `[rows]`.

    sum_x 1 / sum_y max(p(y)/p(x), q(y)/q(x)), over x in both supports (Daliri, Musco, Suresh 2024).
    In the order of rising q/p the maximum is p's for every y up to x and q's for every y after it,
    so two running sums do for all x: it is p q / (p-mass up to x * q + q-mass after x * p).

    Args:
        common: from `on_common_ids`.
    """
    if common.shape[-1] <= CANDIDATES:
        return common.new_tensor([_match(*row) for row in zip(*common.tolist(), strict=True)])
    p, q = common
    ratio, order = (q / p.clamp(min=1e-30)).sort(-1)  # ids that come again have neither
    p, q = p.gather(-1, order), q.gather(-1, order)
    after = (1 - q.cumsum(-1)).clamp(min=0)
    return (q / torch.addcmul(after, p.cumsum(-1), ratio)).sum(-1)


def _match(p: list[float], q: list[float]) -> float:
    """The same for one row of few ids: after a pass of the target each kernel takes 8 us, and most
    ids have one of the two only."""
    both = sorted((y / x, x, y) for x, y in zip(p, q, strict=True) if x and y)
    before, after, total = sum(p) - sum(x for _, x, _ in both), 1.0, 0.0
    for ratio, x, y in both:
        before, after = before + x, after - y
        total += y / (before * ratio + max(after, 0.0))
    return total


class Warper:
    """Logits to a `Distribution`, as transformers' processors and warpers would, in their order.

    Repetition penalty, minimal length, suppressed ids, temperature, top-k, top-p, min-p. Ids tied
    with the last one kept by top-k or top-p are kept too, so that the set does not depend on the
    order of a sort.

    Args:
        sampling: resolved settings.
        prompt_length: tokens before the first generated one.
        columns: token id of each logit column (None: column j is id j).
    """

    def __init__(
        self, sampling: Sampling, prompt_length: int, columns: torch.Tensor | None = None
    ) -> None:
        self._sampling = sampling
        self._prompt_length = prompt_length
        self._columns = columns

    def __call__(self, logits: torch.Tensor, sequence: list[int], first: int) -> Distribution:
        """Warp consecutive rows: row j follows the prefix ``sequence[:first + j]``.

        Args:
            logits: `[rows, columns]`.
            sequence: committed tokens and drafts.
            first: prefix length of row 0.
        """
        sampling = self._sampling
        scores = logits.float()
        if self._columns is None:
            self._columns = torch.arange(scores.shape[1], device=scores.device)
        columns = self._columns
        scores = self._penalised(scores, columns, sequence, first)
        scores = self._suppressed(scores, columns, first)
        if sampling.temperature == 0:
            best = scores.argmax(-1, keepdim=True)
            return Distribution(columns[best], torch.ones_like(best, dtype=torch.float32))
        whole = (scores / sampling.temperature).softmax(-1)
        if not sampling.truncates:
            return Distribution(columns.expand(len(whole), -1), whole)
        size = min(whole.shape[1], max(CANDIDATES, 2 * sampling.top_k))
        while True:
            probs, indices = whole.topk(size)
            kept = self._kept(probs)
            if size == whole.shape[1] or not kept[:, -1].any():
                break
            size = min(16 * size, whole.shape[1])
        width = int(kept.sum(-1).max())
        probs = (probs * kept)[:, :width]
        return Distribution(columns[indices[:, :width]], probs / probs.sum(-1, keepdim=True))

    def _kept(self, probs: torch.Tensor) -> torch.Tensor:
        """Which of the descending ``probs`` [rows, n] survive top-k, top-p and min-p."""
        sampling = self._sampling
        kept = torch.ones_like(probs, dtype=torch.bool)
        if sampling.top_k:
            kept &= probs >= probs[:, min(sampling.top_k, probs.shape[1]) - 1, None]
        if sampling.top_p < 1:
            left = probs * kept
            mass = left.cumsum(-1)
            bound = sampling.top_p * (mass[:, -1:] if sampling.top_k else 1)
            inside = mass - left < bound
            inside[:, 0] = True
            last = probs.gather(1, inside.sum(-1, keepdim=True) - 1)
            kept &= probs >= last
        if sampling.min_p:
            kept &= probs >= sampling.min_p * probs[:, :1]
        return kept

    def _penalised(
        self, scores: torch.Tensor, columns: torch.Tensor, sequence: list[int], first: int
    ) -> torch.Tensor:
        penalty = self._sampling.repetition_penalty
        if penalty == 1:
            return scores
        seen = torch.zeros(1 + max(int(columns.max()), *sequence), dtype=torch.bool)
        seen[sequence[:first]] = True
        rows = []
        for row in range(len(scores)):
            if row:
                seen[sequence[first + row - 1]] = True
            rows.append(seen[columns.cpu()])
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(torch.stack(rows).to(scores.device), penalised, scores)

    def _suppressed(self, scores: torch.Tensor, columns: torch.Tensor, first: int) -> torch.Tensor:
        sampling, start = self._sampling, first - self._prompt_length
        banned = [list(sampling.suppress_tokens) for _ in scores]
        for row, ids in enumerate(banned):
            if start + row < sampling.min_new_tokens:
                ids.extend(sampling.eos_token_ids)
            if start + row == 0:
                ids.extend(sampling.begin_suppress_tokens)
        if not any(banned):
            return scores
        dropped = [torch.isin(columns, columns.new_tensor(ids)) for ids in banned]
        return scores.masked_fill(torch.stack(dropped), float("-inf"))


# --------------------------------------------------------------------------- acceptance rules


class Verdict(NamedTuple):
    """What a verification pass decided."""

    num_accepted: int  # drafts kept, from the front
    token: int  # the target's token after them: correction or bonus
    mismatches: int = 0  # committed tokens that are not the pass's own choice (recorded paths)


class AcceptanceRule(Protocol):
    """How tokens are drawn from the draft, and which of them the target keeps."""

    def draw(self, q: Distribution, position: int) -> int:
        """A token from the single row ``q`` for absolute ``position``."""
        ...

    def judge(
        self, p: Distribution, q: Distribution | None, drafts: list[int], first: int
    ) -> Verdict:
        """Accept a prefix of ``drafts`` and choose the token after it.

        Args:
            p: the target's rows for drafts 0..g-1 and the row after the last, `g + 1` rows.
            q: the rows the drafts were drawn from, `g` rows (None if there are no drafts).
            drafts: the `g` drafted tokens.
            first: absolute position of the first draft.
        """
        ...

    def probability(self, common: torch.Tensor) -> torch.Tensor:
        """That a token drawn from each row of q is accepted, `[rows]`; see `on_common_ids`."""
        ...


class Rejection:
    """Accept with min(1, p/q), else draw from (p - q)+ (Leviathan et al. 2023).

    The highest acceptance there is; the random numbers come from one generator, so the text depends
    on draft and lengths, its law does not.
    """

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def draw(self, q: Distribution, position: int) -> int:
        return self._choose(q.ids[0], q.probs[0])

    def judge(
        self, p: Distribution, q: Distribution | None, drafts: list[int], first: int
    ) -> Verdict:
        for j, token in enumerate(drafts):
            assert q is not None
            wanted = torch.tensor([[token]], device=p.ids.device)
            ratio = float(p[j : j + 1].of(wanted)) / float(q[j : j + 1].of(wanted))
            if self._uniform() >= ratio:
                residual = (p.probs[j] - q[j : j + 1].of(p.ids[j : j + 1])[0]).clamp(min=0)
                return Verdict(j, self._choose(p.ids[j], residual))
        return Verdict(len(drafts), self._choose(p.ids[-1], p.probs[-1]))

    def probability(self, common: torch.Tensor) -> torch.Tensor:
        return overlap(common)

    def _uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self._random))

    def _choose(self, ids: torch.Tensor, weights: torch.Tensor) -> int:
        cumulative = weights.double().cumsum(-1)
        point = self._uniform() * cumulative[-1]
        # side="right": a point of exactly zero must not fall on an id of zero weight
        return int(ids[int(torch.searchsorted(cumulative, point, side="right"))])


class Coupled:
    """Draft and target share their noise, so the text is the target's own seeded path.

    Both emit argmin_x E_x / prob(x) with E_x ~ Exp(1) keyed by (seed, absolute position, x)
    (Daliri, Musco, Suresh 2024): whatever the drafter, gamma, stop rule or update, the tokens are
    those of gamma = 0, as long as the target's probabilities are. At temperature 0 this is greedy
    decoding.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def draw(self, q: Distribution, position: int) -> int:
        return self.choices(q, position)[0]

    def judge(
        self, p: Distribution, q: Distribution | None, drafts: list[int], first: int
    ) -> Verdict:
        choices = self.choices(p, first)
        accepted = _common_prefix(drafts, choices)
        return Verdict(accepted, choices[accepted])

    def probability(self, common: torch.Tensor) -> torch.Tensor:
        return match_probability(common)

    def choices(self, p: Distribution, first: int) -> list[int]:
        """The target's token for each row of ``p``, at positions ``first``, ``first`` + 1, ..."""
        positions = torch.arange(first, first + len(p), device=p.ids.device)
        noise = exponential_noise(self._seed, positions[:, None], p.ids)
        best = (noise / p.probs.double()).argmin(-1, keepdim=True)
        return p.ids.gather(1, best)[:, 0].tolist()


class Recorded:
    """Commits a recorded token path, whatever the pass would have chosen.

    Outside float32 the target's logits depend on the number of rows in a pass, so paired arms can
    only share their text by force: drafts are accepted where they equal the path, and the pass's
    own differing choices are counted.

    Args:
        path: tokens of this generation; ``path[0]`` stands at absolute position ``start``.
        rule: draws the drafts and knows the pass's own choices.
    """

    def __init__(self, path: list[int], start: int, rule: Coupled) -> None:
        self._path, self._start, self._rule = path, start, rule

    def draw(self, q: Distribution, position: int) -> int:
        return self._rule.draw(q, position)

    def judge(
        self, p: Distribution, q: Distribution | None, drafts: list[int], first: int
    ) -> Verdict:
        path = self._path[first - self._start :]
        accepted = _common_prefix(drafts, path)
        own = self._rule.choices(p[: accepted + 1], first)
        mismatches = sum(a != b for a, b in zip(own, path, strict=False))
        return Verdict(accepted, path[accepted], mismatches)

    def probability(self, common: torch.Tensor) -> torch.Tensor:
        return self._rule.probability(common)


def _common_prefix(drafts: list[int], tokens: list[int]) -> int:
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == tokens[accepted]:
        accepted += 1
    return accepted


def exponential_noise(seed: int, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Exp(1) noise for (seed, position, token id), float64, never zero, of the broadcast shape.

    A hash instead of a generator: nothing of vocabulary size is kept, and a rejected tail cannot
    shift the noise of later positions.
    """
    state = _mix(_mix(torch.tensor(seed, device=ids.device)) ^ positions)
    bits = _mix(state ^ ids)
    # 52 bits, so that adding a half is exact and u lies strictly between 0 and 1
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return -uniform.log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64: a bijection of 64-bit integers, multiplication wrapping."""
    x = x + -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right of a signed 64-bit integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
