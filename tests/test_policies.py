"""Published rules on inputs computed by hand, and beside transformers' own code."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from controllers import CAP, POLICIES, make_policy
from controllers.adaedl import AdaEdl
from controllers.bandit import Bandit
from controllers.confidence import best_threshold
from tests import tiny
from tests.test_engine import decode, sampled
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.policy import RoundOutcome, RoundState, Signals
from tts.state import load_state, save_state

STATE = RoundState(10, 20, CAP)


def said(entropy=0.0, confidence=0.5, probability=0.5, offset=0):
    return Signals(offset, entropy, confidence, probability)


def outcome(accepted, probabilities, draft_ms=1.0, verify_ms=1.0):
    drafted = [said(probability=p, offset=j) for j, p in enumerate(probabilities)]
    return RoundOutcome(STATE, accepted, drafted, draft_ms=draft_ms, verify_ms=verify_ms)


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_plans_beyond_the_limit_or_its_cap(name):
    policy = make_policy(name, cap=3, gamma=3)
    for accepted in (0, 1, 2, 3, 3, 3, 0):
        gamma = policy.plan(STATE)
        assert gamma <= 3
        policy.observe(outcome(min(accepted, gamma), [0.9] * gamma))
    assert policy.plan(RoundState(10, 20, 1)) <= 1
    assert policy.plan(RoundState(10, 20, 0)) == 0


def test_a_cap_of_zero_is_refused():
    with pytest.raises(UserError, match="cap: 0"):
        make_policy("svip", cap=0)


def test_svip_stops_above_six_tenths_of_a_nat():
    policy = make_policy("svip")
    assert policy.plan(STATE) == 40
    assert policy.proceed(STATE, said(entropy=0.59))
    assert not policy.proceed(STATE, said(entropy=0.61))


def test_adaedl_compares_the_bound_with_a_threshold_that_follows_acceptance():
    policy = AdaEdl(threshold=0.4)
    assert policy.proceed(STATE, said(entropy=1.79))  # (1 - .4)^2 / .2 = 1.8 nats
    assert not policy.proceed(STATE, said(entropy=1.81))
    policy.observe(outcome(1, [0.9] * 4))  # r = .5 * .9 + .5 * .25 = .575 < .9
    assert policy.threshold == pytest.approx(0.9 * 0.4 + 0.1 * 0.41)
    policy.observe(outcome(8, [0.9] * 8))  # the cap was reached: nothing moves
    assert policy.threshold == pytest.approx(0.401)
    policy.observe(outcome(4, [0.9] * 4))  # r = .89375, still below
    policy.observe(outcome(4, [0.9] * 4))  # r = .946875
    assert policy.threshold == pytest.approx(0.401 + 0.001 - 0.001)
    policy.reset()
    assert policy.threshold == 0.4


def peer(schedule, threshold=0.4):
    """transformers' generator, without its models: the part that follows the rounds."""
    made = AssistedCandidateGenerator.__new__(AssistedCandidateGenerator)
    made.assistant_generation_config = SimpleNamespace(
        num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=threshold
    )
    made.generation_config = SimpleNamespace(assistant_confidence_threshold=threshold)
    made.num_assistant_tokens, made.probs, made.matches = 20, [], []
    return made


def test_the_heuristic_is_that_of_transformers():
    theirs, ours = peer("heuristic"), make_policy("heuristic")
    random = np.random.default_rng(0)
    for _ in range(200):
        assert ours.plan(STATE) == min(CAP, int(theirs.num_assistant_tokens))
        gamma = ours.plan(STATE)
        accepted = gamma if random.random() < 0.3 else int(random.integers(gamma))
        ours.observe(outcome(accepted, [0.9] * gamma))
        theirs.update_candidate_strategy(None, torch.zeros(1, gamma + 1, 2), accepted)
    persistent, transient = make_policy("heuristic"), make_policy("heuristic_transient")
    for policy in (persistent, transient):
        policy.observe(outcome(3, [0.9] * 20))
        policy.reset()
    assert (persistent.plan(STATE), transient.plan(STATE)) == (19, 20)


def test_the_confidence_rule_and_its_fit_are_those_of_transformers():
    theirs, ours = peer("constant"), make_policy("confidence")
    random = np.random.default_rng(1)
    seen = set()
    for _ in range(150):
        assert ours.threshold == theirs.generation_config.assistant_confidence_threshold
        probabilities, hits = [], []
        for _ in range(ours.plan(STATE)):
            p = round(float(random.uniform(0.02, 0.98)), 2)  # with ties
            probabilities.append(p)
            hits.append(random.random() < p)
            # ConfidenceCriteria: stop after a token whose probability is below the threshold
            assert ours.proceed(STATE, said(probability=p)) == (not p < ours.threshold)
            if p < ours.threshold:
                break
        accepted = [*hits, False].index(False)
        ours.observe(outcome(accepted, probabilities))
        theirs.probs.extend(probabilities)
        scores = torch.zeros(1, len(probabilities) + 1, 2)
        theirs.update_candidate_strategy(None, scores, accepted)
        seen.add(ours.threshold)
    assert len(seen) > 3


def test_at_temperature_zero_the_confidence_rule_reads_the_drafts_softmax():
    policy = make_policy("confidence")
    assert not policy.proceed(STATE, said(probability=1.0, confidence=0.3))
    assert policy.proceed(STATE, said(probability=1.0, confidence=0.5))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=40))
def test_the_best_threshold_is_that_of_the_roc_curve(pairs):
    values = np.array([p / 10 for p, _ in pairs])
    kept = np.array([k for _, k in pairs])
    if kept.all() or not kept.any():
        return
    fpr, tpr, _ = roc_curve(kept, values)
    costs = fpr + 3 * (1 - tpr)
    ours = best_threshold(values, kept)
    missed = (kept & (values < ours)).sum() / kept.sum()
    alarms = (~kept & (values >= ours)).sum() / (~kept).sum()
    assert alarms + 3 * missed == pytest.approx(costs.min())


def test_the_bandit_tries_every_arm_then_settles_on_the_fastest():
    policy, chosen = Bandit(cap=4), []
    speed = [1.0, 1.3, 1.6, 1.2, 0.9]  # tokens per ms of each gamma
    for _ in range(3000):
        gamma = policy.plan(STATE)
        chosen.append(gamma)
        policy.observe(outcome(0, [0.9] * gamma, verify_ms=1 / speed[gamma], draft_ms=0.0))
    assert sorted(chosen[:5]) == [0, 1, 2, 3, 4]
    late = chosen[-500:]
    assert max(set(late), key=late.count) == 2


def test_the_bonus_of_the_bandit_is_that_of_the_paper():
    policy = Bandit(cap=1)
    policy.observe(outcome(0, [], draft_ms=0.0, verify_ms=0.5))  # reward 2
    for _ in range(3):
        policy.observe(outcome(0, [0.9], draft_ms=0.5, verify_ms=0.5))  # reward 1
    bonus = policy._bonus(policy._plays)
    for n, value in zip((1, 3), bonus, strict=True):
        log = math.log(2 * 4**2 * (1 + n) ** 0.5 / 0.05)
        assert value == pytest.approx(2 / 2 * math.sqrt((1 + n) / n**2 * (1 + 2 * log)))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "bandit"])
def test_text_does_not_depend_on_the_policy(name):
    pair = tiny.pair("llama3.1", noise=0.03)
    decoder = SpeculativeDecoder(pair, policy=make_policy(name), acceptance="coupled")
    prompt = torch.tensor([[3, 17, 5]])
    result = decoder.generate(prompt, generation_config=sampled(80), seed=2)
    assert result.tokens == decode(pair, 0, sampled(80), seed=2, prompt=prompt).tokens
    assert name == "mlp" or any(r.num_accepted for r in result.rounds)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_goes_on_from_a_saved_state(name, tmp_path):
    pair = tiny.pair("llama3.1", noise=0.03)
    first, second = (
        SpeculativeDecoder(pair, policy=make_policy(name, seed=seed)) for seed in (0, 1)
    )
    first.generate(torch.tensor([[3, 17, 5]]), generation_config=sampled(60))
    save_state(first, tmp_path / "state.safetensors")
    load_state(second, tmp_path / "state.safetensors")
    assert repr(second.policy.state_dict()) == repr(first.policy.state_dict())
