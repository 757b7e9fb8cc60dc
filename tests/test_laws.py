"""Rejection sampling keeps the target's law, tested against exact enumeration; errors do not."""

from itertools import product
from math import prod

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from tests import tiny
from tests.test_sampling import listed
from tts.acceptance import Block, Rejection, _reach
from tts.distill.config import DistillConfig
from tts.drafting.autoregressive import AutoregressiveDrafter
from tts.drafting.protocol import Proposal
from tts.engine import SpeculativeDecoder
from tts.policy import RoundOutcome
from tts.sampling import Distribution, Warper
from tts.settings import resolve

VOCAB, LENGTH = 8, 3
PROMPT = [3, 1]
CONFIG = GenerationConfig(
    max_new_tokens=LENGTH, do_sample=True, temperature=1.2, top_k=0, top_p=0.95,
    repetition_penalty=1.2,
)  # fmt: skip
ALPHA = 1e-3  # the seeds are fixed, so a pass stays a pass


class Mixed:
    """Plans gamma 1, 2, 3 in turn and stops early after an unsure token, which stays drafted."""

    def __init__(self):
        self.rounds = 0

    def plan(self, state):
        return min(1 + self.rounds % 3, state.limit)

    def proceed(self, state, signals):
        return signals.probability > 0.3

    def observe(self, outcome: RoundOutcome):
        self.rounds += 1

    def reset(self):
        pass


def small_pair():
    target = tiny.model("llama3.1", vocab=VOCAB, layers=1)
    return tiny.ModelPair(target, tiny.noisy(target, 0.5), tiny.tokenizer(VOCAB), "tiny")


def exact_law(pair):
    """Probability of each of the VOCAB ** LENGTH continuations under the warped target."""
    sampling, _ = resolve(pair.target, CONFIG, len(PROMPT))
    warp = Warper(sampling, len(PROMPT))
    law = {}
    for tail in product(range(VOCAB), repeat=LENGTH):
        sequence = [*PROMPT, *tail]
        logits = pair.target(torch.tensor([sequence])).logits[0, len(PROMPT) - 1 : -1]
        rows = warp(logits, sequence, len(PROMPT))
        law[tail] = prod(row.of(token) for row, token in zip(rows, tail, strict=True))
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    return law


def p_value(pair, samples, decoder_of):
    """Chi-square of sampled continuations against the exact law, rare cells pooled."""
    law = exact_law(pair)
    counts = dict.fromkeys(law, 0)
    decoder = decoder_of(pair)
    for seed in range(samples):
        result = decoder.generate(torch.tensor([PROMPT]), generation_config=CONFIG, seed=seed)
        counts[tuple(result.tokens)] += 1
    common = [t for t in law if law[t] * samples >= 5]
    rest = [t for t in law if t not in common]
    observed = [counts[t] for t in common]
    expected = [law[t] * samples for t in common]
    if rest:
        observed.append(sum(counts[t] for t in rest))
        expected.append(samples - sum(expected))
    if expected[-1] < 5:  # an ill-filled rest joins the smallest cell
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    scale = sum(observed) / sum(expected)
    return chisquare(observed, [e * scale for e in expected]).pvalue


def honest(pair):
    return SpeculativeDecoder(pair, policy=Mixed(), acceptance="rejection")


def block(pair):
    return SpeculativeDecoder(pair, policy=Mixed(), acceptance="block")


def learning(pair):
    """The draft changes after every round, within three tokens and anew for each sample."""
    distill = DistillConfig(
        stride=1, window=3, capacity=8, rank=2, learning_rate=0.1, guard=False, max_update_share=1
    )
    return SpeculativeDecoder(pair, policy=Mixed(), acceptance="rejection", distill=distill)


class DropsUnsure(AutoregressiveDrafter):
    """Planted error: an unsure last token is taken back after it was drawn."""

    def propose(self, sequence, *args):
        proposal = super().propose(sequence, *args)
        if proposal.signals[-1].probability > 0.5:
            return proposal
        kept = len(proposal.tokens) - 1
        self._cached.rollback(min(self._cached.length, len(sequence) + kept - 1))
        return Proposal(
            proposal.tokens[:kept], proposal.q[:kept], proposal.signals[:kept], proposal.late
        )


def flattened(q):
    changed = q.probs**0.5
    return Distribution(q.ids, changed / changed.sum())


class StaleQ(AutoregressiveDrafter):
    """Planted error: q is what a changed draft would say, not what the tokens were drawn from."""

    def propose(self, *args):
        proposal = super().propose(*args)
        return proposal._replace(q=[flattened(q) for q in proposal.q])


def planted(drafter):
    def decoder_of(pair):
        decoder = honest(pair)
        original = decoder.session

        def session():
            made = original()
            made.drafter = drafter(pair.draft, VOCAB)
            return made

        decoder.session = session
        return decoder

    return decoder_of


@pytest.mark.parametrize(("rule", "samples"), [(honest, 4000), (block, 1000)])
def test_the_law_of_the_first_three_tokens_is_kept(rule, samples):
    assert p_value(small_pair(), samples, rule) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("rule", [honest, block])
def test_the_law_is_kept_with_many_samples(rule):
    assert p_value(small_pair(), 20000, rule) > ALPHA


def test_rejection_keeps_the_law_while_the_draft_learns():
    pair = small_pair()
    decoder, prompt = learning(pair), torch.tensor([PROMPT])
    texts = [decoder.generate(prompt, generation_config=CONFIG, seed=seed) for seed in range(9)]
    assert any(r.adapted for text in texts for r in text.rounds)
    assert p_value(pair, 1000, learning) > ALPHA


@pytest.mark.slow
def test_rejection_keeps_the_law_while_the_draft_learns_with_many_samples():
    assert p_value(small_pair(), 4000, learning) > ALPHA


@pytest.mark.parametrize(("drafter", "samples"), [(DropsUnsure, 1000), (StaleQ, 2000)])
def test_the_law_test_finds_a_planted_error(drafter, samples):
    """In fewer samples than the honest draft passes, so in those, too."""
    assert p_value(small_pair(), samples, planted(drafter)) < 1e-6


# what a target (p) and a draft (q) of three tokens say, by position: a token too many, or too few
P = [
    listed(range(3), row)
    for row in ([0.4, 0.6, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0])
]
Q = [listed(range(3), row) for row in ([0.8, 0.2, 0.0], [0.35, 0.1, 0.55], [0.5, 0.2, 0.3])]


def p_value_of_tables(rule, samples):
    """As `p_value`, without models; a block ends after a token 2."""
    counts = dict.fromkeys(product(range(3), repeat=LENGTH), 0)
    for seed in range(samples):
        judge, text = rule(seed), []
        while (start := len(text)) < LENGTH:
            drafts = []
            while start + len(drafts) < LENGTH and drafts[-1:] != [2]:
                drafts.append(judge.draw(Q[start + len(drafts)], 0))
            end = start + len(drafts)
            verdict = judge.judge(P[start : end + 1], Q[start:end], drafts, 0)
            text += [*drafts[: verdict.num_accepted], verdict.token]
        counts[tuple(text[:LENGTH])] += 1
    law = {t: prod(p.of(x) for p, x in zip(P, t, strict=False)) for t in counts}
    if any(counts[t] for t in law if not law[t]):
        return 0.0
    scale = samples / sum(law.values())
    likely = [t for t in law if law[t]]
    return chisquare([counts[t] for t in likely], [law[t] * scale for t in likely]).pvalue


class DrawsTheRestAlone(Block):
    """Planted error: the token after the block is drawn as if those before it had been sure."""

    def judge(self, p, q, drafts, first):
        verdict = super().judge(p, q, drafts, first)
        j = verdict.num_accepted
        if j == len(drafts):
            return verdict
        left = (p[j].probs - q[j].over(p[j].ids)).clip(min=0)
        return verdict._replace(token=self._choose(p[j].ids, left))


class EveryTokenForItself(Block):
    """Planted error: a token is kept as often as it would be alone."""

    def judge(self, p, q, drafts, first):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tts.acceptance._reach", self._alone)
            return super().judge(p, q, drafts, first)

    def _alone(self, common, drafts):
        rows = zip(common, drafts, strict=True)
        return [1.0, *(_reach([row], [token])[1] for row, token in rows)]


class KeepsASurplus(Block):
    """Planted error: what a token has too much is carried over to the next as well."""

    def judge(self, p, q, drafts, first):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tts.acceptance.min", lambda one, ratio: ratio, raising=False)
            return super().judge(p, q, drafts, first)


@pytest.mark.parametrize("rule", [Rejection, Block])
def test_blocks_that_end_after_a_token_keep_the_law_of_tables(rule):
    assert p_value_of_tables(rule, 8000) > ALPHA


@pytest.mark.parametrize("error", [DrawsTheRestAlone, EveryTokenForItself, KeepsASurplus])
def test_the_law_of_tables_finds_a_planted_error(error):
    assert p_value_of_tables(error, 8000) < 1e-6
