"""Published rules on inputs computed by hand, and beside transformers' own code."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from controllers import CAP, POLICIES, WEIGHTS, make_policy
from controllers.adaedl import AdaEdl
from controllers.bandit import Bandit
from controllers.confidence import best_threshold
from controllers.or_none import OrNone
from controllers.specdecpp import (
    AcceptanceHead,
    SpecDecPp,
    optimal_threshold,
    save_head,
    weighted_loss,
)
from controllers.speckv import Regressor, SpecKv, step_signals
from tests import tiny
from tests.test_engine import decode, sampled
from tests.test_laws import ALPHA, p_value, small_pair
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.policy import RoundOutcome, RoundState, Signals
from tts.state import load_state, save_state

STATE = RoundState(10, 20, CAP)


def said(entropy=0.0, confidence=0.5, probability=0.5, offset=0):
    return Signals(offset, entropy, confidence, probability)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as `tts fit` writes it, for a draft of width 32."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "mlp.json").write_bytes((WEIGHTS / "mlp.json").read_bytes())
    random = np.random.default_rng(0)
    shapes = ((6, 16), (16,), (16,), (), (4,))
    Regressor(*(np.asarray(random.normal(size=shape)) for shape in shapes)).save(
        folder / "speckv.json"
    )
    torch.manual_seed(0)
    save_head(AcceptanceHead(32), folder / "specdecpp.safetensors", draft="a", tuned=0.7,
              by_cost=0.9)  # fmt: skip
    return folder


def outcome(accepted, probabilities, draft_ms=1.0, verify_ms=1.0):
    drafted = [said(probability=p, offset=j) for j, p in enumerate(probabilities)]
    return RoundOutcome(STATE, accepted, drafted, draft_ms=draft_ms, verify_ms=verify_ms)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(
    cap=st.integers(1, 12),
    rounds=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.floats(0, 8), st.floats(0.01, 1)),
        min_size=1, max_size=12,
    ),
)  # fmt: skip
def test_no_policy_plans_beyond_the_limit_or_its_cap(weights, name, cap, rounds):
    policy = make_policy(name, cap=cap, gamma=cap, weights=weights)
    hidden = torch.zeros(32)
    if name == "oracle":
        policy.follow(0, [0] * 1000)
    for limit, accepted, entropy, probability in rounds:
        state = RoundState(10, 20, limit)
        gamma, drafted = policy.plan(state), []
        assert 0 <= gamma <= min(limit, cap)
        for offset in range(gamma):
            newest = Signals(offset, entropy, probability, probability, offset % 3, hidden)
            drafted.append(newest)
            if not policy.proceed(state, newest):
                break
        accepted = min(accepted, len(drafted))
        labels = [0.5] * min(accepted + 1, len(drafted))
        policy.observe(RoundOutcome(state, accepted, drafted, lambda x=labels: x, 5.0, 30.0))


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
    policy.observe(outcome(8, [0.9] * 8))  # r = .7875, below also at the cap
    policy.observe(outcome(4, [0.9] * 4))  # r = .89375, still below
    assert policy.threshold == pytest.approx(0.403)
    policy.observe(outcome(8, [0.9] * 8))  # r = .946875, but the cap was reached: no lower
    assert policy.threshold == pytest.approx(0.403)
    policy.observe(outcome(4, [0.9] * 4))
    assert policy.threshold == pytest.approx(0.402)
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
    # by arm: what was seen, and the reward of it
    rewards = {0: (outcome(0, [], 0.0, 0.5), 2), 1: (outcome(0, [0.9], 0.0, 1.0), 1)}
    for arm in (0, 1):  # each once
        assert policy.plan(STATE) == arm
        policy.observe(rewards[arm][0])
    for _ in range(2):
        policy._arm = 1
        policy.observe(rewards[1][0])
    bonus = policy._bonus(policy._plays)
    for n, value in zip((1, 3), bonus, strict=True):
        log = math.log(2 * 4**2 * (1 + n) ** 0.5 / 0.05)
        assert value == pytest.approx(2 / 2 * math.sqrt((1 + n) / n**2 * (1 + 2 * log)))


def test_the_reward_of_the_bandit_is_tokens_over_the_whole_round():
    policy = Bandit(cap=2)
    policy._arm = 2
    policy.observe(outcome(2, [0.9, 0.9], draft_ms=1.0, verify_ms=3.0))
    assert policy.state_dict()["sums"].tolist() == [0, 0, 3 / 4]


def test_the_bandit_tries_every_length_of_a_draft_that_goes_no_further():
    policy, planned = Bandit(cap=6), []
    for _ in range(200):
        gamma = policy.plan(STATE)
        planned.append(gamma)
        drafted = min(gamma, 3)  # a block draft's own limit
        policy.observe(outcome(0, [0.9] * drafted, verify_ms=10.0 + drafted))
    assert set(planned[:7]) == set(range(7))
    plays = [planned.count(gamma) for gamma in range(7)]
    assert max(plays) == plays[0] < 100  # nothing is ever accepted, and no length is stuck to


def test_a_round_without_drafts_teaches_the_heuristic_nothing():
    policy = make_policy("heuristic")
    policy.observe(outcome(0, []))
    assert policy.plan(STATE) == 20


def test_the_head_by_cost_has_a_threshold_of_its_own(weights):
    assert make_policy("specdecpp", weights=weights).threshold == 0.7
    assert make_policy("specdecpp_by_cost", weights=weights).threshold == 0.9


def test_the_regressor_knows_the_compression():
    wide = regressor(0.15, 1.0)
    wide.hidden[4, 1], wide.output[1] = 1.0, -0.2
    plans = [SpecKv(wide, compression=name).plan(STATE) for name in ("none", "int8", "nf4")]
    assert plans == [4, 2, 2]


def test_the_confidence_rule_starts_anew():
    policy = make_policy("confidence")
    policy.observe(outcome(1, [0.9, 0.3, 0.8]))
    policy.reset()
    assert repr(policy.state_dict()) == repr(make_policy("confidence").state_dict())


def test_the_heuristic_does_not_wind_up_beyond_its_cap():
    policy = make_policy("heuristic", cap=4)
    for _ in range(50):
        policy.observe(outcome(4, [0.9] * 4))
    policy.observe(outcome(0, [0.9] * 4))
    assert policy.plan(STATE) == 3


def test_a_rule_that_may_rest_decides_the_same_after_its_state_was_saved():
    def run(rounds, policy, saved=None):
        planned = []
        for i in range(rounds):
            if i == saved:
                state, policy = policy.state_dict(), OrNone(make_policy("fixed", gamma=4))
                policy.load_state_dict(state)
            gamma = policy.plan(STATE)
            late = 50.0 * (gamma > 0 and planned[-1:] == [0])  # the draft reads what it missed
            policy.observe(outcome(2 * (gamma > 0), [0.9] * gamma, draft_ms=late, verify_ms=10.0))
            planned.append(gamma)
        return planned

    fresh = run(40, OrNone(make_policy("fixed", gamma=4)))
    for saved in range(1, 12):
        assert run(40, OrNone(make_policy("fixed", gamma=4)), saved) == fresh


def test_every_sequence_starts_a_policy_anew():
    policy = timed(make_policy("heuristic_transient"))
    decoder = SpeculativeDecoder(tiny.pair(noise=0.3), policy=policy, acceptance="coupled")
    for _ in range(2):
        result = decoder.generate(torch.tensor([[3, 17, 5]]), generation_config=sampled(60))
        assert result.rounds[0].gamma == 20


def timed(policy):
    """A policy to which a pass takes 10 ms and a draft 1: the same choices on every machine."""
    observe = policy.observe
    policy.observe = lambda seen: observe(replace(seen, draft_ms=seen.num_drafted, verify_ms=10.0))
    return policy


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "oracle"])
def test_text_does_not_depend_on_the_policy(weights, name):
    pair = tiny.pair("llama3.1", noise=0.03)
    policy = timed(make_policy(name, weights=weights))
    decoder = SpeculativeDecoder(pair, policy=policy, acceptance="coupled")
    prompt = torch.tensor([[3, 17, 5]])
    result = decoder.generate(prompt, generation_config=sampled(80), seed=2)
    assert result.tokens == decode(pair, 0, sampled(80), seed=2, prompt=prompt).tokens
    assert any(r.num_accepted for r in result.rounds)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "oracle"])
def test_every_policy_goes_on_from_a_saved_state(weights, name, tmp_path):
    pair = tiny.pair("llama3.1", noise=0.03)
    first, second = (
        SpeculativeDecoder(pair, policy=make_policy(name, seed=seed, weights=weights))
        for seed in (0, 1)
    )
    first.generate(torch.tensor([[3, 17, 5]]), generation_config=sampled(60))
    save_state(first, tmp_path / "state.safetensors")
    load_state(second, tmp_path / "state.safetensors")
    assert repr(second.policy.state_dict()) == repr(first.policy.state_dict())


def test_the_oracle_stops_at_the_first_token_that_the_text_does_not_have():
    policy = make_policy("oracle")
    policy.follow(8, [3, 1, 4, 1, 5, 9])
    assert policy.plan(STATE) == 40  # position 10: the text goes on with 4, 1, 5, 9
    assert policy.proceed(STATE, said()._replace(offset=0, token=4))
    assert policy.proceed(STATE, said()._replace(offset=1, token=1))
    assert not policy.proceed(STATE, said()._replace(offset=2, token=9))


@pytest.mark.slow  # few samples would not find a token that is dropped
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "oracle"])
def test_rejection_keeps_the_law_under_every_policy(weights, name):
    def decoder(pair):
        policy = timed(make_policy(name, gamma=2, weights=weights))
        return SpeculativeDecoder(pair, policy=policy, acceptance="rejection")

    assert p_value(small_pair(), 3000, decoder) > ALPHA


def test_the_oracle_drafts_one_token_more_than_is_accepted():
    pair = tiny.pair("llama3.1", noise=0.03)
    prompt = torch.tensor([[3, 17, 5]])
    path = decode(pair, 0, sampled(60), seed=2, prompt=prompt).tokens
    policy = make_policy("oracle")
    policy.follow(0, path)
    decoder = SpeculativeDecoder(pair, policy=policy, acceptance="coupled")
    result = decoder.generate(prompt, generation_config=sampled(60), seed=2, path=path)
    assert result.tokens == path
    assert sum(r.num_accepted for r in result.rounds) > 10
    assert all(r.num_drafted == r.num_accepted + 1 for r in result.rounds[:-1])


def test_the_oracle_without_a_path_is_refused():
    with pytest.raises(UserError, match="oracle needs the text in advance"):
        make_policy("oracle").plan(STATE)


def regressor(slope, floor):
    """Predicts floor - slope * gamma, whatever the signals."""
    hidden = np.zeros((6, 16))
    hidden[5, 0] = 1.0
    output = np.zeros(16)
    output[0] = -slope
    return Regressor(hidden, np.zeros(16), output, np.array(floor), np.full(4, 0.5))


def test_speckv_takes_the_length_with_the_most_predicted_tokens():
    # rates .7 .4 .1 0 of 2 4 6 8 tokens: 1.4 1.6 .6 0 accepted
    policy = SpecKv(regressor(0.15, 1.0))
    assert policy.plan(STATE) == 4
    assert [policy.plan(RoundState(10, 20, limit)) for limit in (3, 2, 1, 0)] == [2, 2, 1, 0]
    assert SpecKv(regressor(0.0, 0.3)).plan(STATE) == 8
    assert SpecKv(regressor(0.0, 0.3), cap=7).plan(STATE) == 6


def test_speckv_reads_the_step_before_in_bits():
    assert step_signals([said(entropy=math.log(2)), said(entropy=math.log(8), confidence=0.1)]) == (
        pytest.approx((2.0, 0.3, 3.0, 0.1))
    )
    wide = regressor(0.15, 1.0)
    wide.hidden[0, 1], wide.output[1] = 1.0, -0.2  # each bit of mean entropy costs .2
    policy = SpecKv(wide._replace(typical=np.zeros(4)))
    assert policy.plan(STATE) == 4
    drafted = [said(entropy=math.log(2))]
    policy.observe(RoundOutcome(STATE, 0, drafted))  # rates .5 .2 0 0
    assert policy.plan(STATE) == 2
    policy.reset()
    assert policy.plan(STATE) == 4


def certain(folder, acceptance, threshold):
    """SpecDec++ with a head that says ``acceptance`` of every token."""
    head = AcceptanceHead(4)
    with torch.no_grad():
        for weight in head.parameters():
            weight.zero_()
        head.output.bias[1] = math.log(acceptance / (1 - acceptance))
    file = folder / "head.safetensors"
    save_head(head, file, draft="a", tuned=threshold, by_cost=0.5)
    return SpecDecPp(file)


@pytest.mark.parametrize(
    ("acceptance", "threshold", "length"),
    [
        (0.8, 0.30, 3),  # .2 then .36 > .30; the newest token is sent unscored
        (0.8, 0.40, 4),  # .2, .36, .488
        (0.8, 0.10, 2),
        (0.01, 0.10, 2),  # two at least
    ],
)
def test_specdecpp_stops_when_a_rejection_is_likely(tmp_path, acceptance, threshold, length):
    policy = certain(tmp_path, acceptance, threshold)
    for _ in range(2):  # the second round knows nothing of the first
        tokens = 1
        while policy.proceed(STATE, said(offset=tokens - 1)._replace(hidden=torch.zeros(4))):
            tokens += 1
        assert tokens == length
    assert policy.plan(STATE) == 20


def test_the_loss_of_specdecpp_weighs_rejections_six_times():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])  # acceptance 1/2, 3/4
    accepted = torch.tensor([0.0, 0.5])
    expected = (6 * math.log(2) + 3 * math.log(4) + 0.5 * math.log(4 / 3)) / (6 + 3 + 0.5)
    assert float(weighted_loss(logits, accepted)) == pytest.approx(expected)


def test_the_blocks_of_the_head_have_weights_of_their_own():
    head = AcceptanceHead(8)
    assert sum(p.numel() for p in head.parameters()) == 3 * (64 + 8) + 18
    x = torch.randn(8)
    expected = x
    for block in head.blocks:
        z = block.weight @ expected + block.bias
        expected = expected + z / (1 + torch.exp(-z))
    torch.testing.assert_close(head(x), head.output.weight @ expected + head.output.bias)


def test_the_threshold_of_the_theorem_weighs_a_draft_against_a_pass():
    assert optimal_threshold(4.0, 36.0) == pytest.approx(0.9)


def test_a_head_of_another_draft_is_refused(weights):
    make_policy("specdecpp", weights=weights, draft="a")
    with pytest.raises(UserError, match="trained for another draft"):
        make_policy("specdecpp", weights=weights, draft="b")
    policy = make_policy("specdecpp", weights=weights)
    for hidden in (None, torch.zeros(8)):
        with pytest.raises(UserError, match="width 32"):
            policy.proceed(STATE, said(offset=1)._replace(hidden=hidden))


@pytest.mark.parametrize("name", ["mlp", "speckv", "specdecpp"])
@pytest.mark.parametrize("content", [None, "", "{}", '{"features": ["a"], "weights": []}'])
def test_weights_that_cannot_be_read_are_refused(tmp_path, name, content):
    for file in ("mlp.json", "speckv.json", "specdecpp.safetensors"):
        if content is not None:
            (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=r"weights: .* write it with `tts fit`") as caught:
        make_policy(name, weights=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_same_seed_makes_the_same_choices(weights):
    pair = tiny.pair("llama3.1", noise=0.03)
    for name in ("speckv", "specdecpp"):
        drafted = []
        for _ in range(2):
            decoder = SpeculativeDecoder(
                pair, policy=make_policy(name, weights=weights), acceptance="coupled"
            )
            result = decoder.generate(torch.tensor([[3, 17]]), generation_config=sampled(40))
            drafted.append([r.num_drafted for r in result.rounds])
        assert drafted[0] == drafted[1]
