"""Speculation changes nothing but the speed: greedy and coupled text equal the target's own."""

import pytest
import torch
from transformers import GenerationConfig

from controllers import make_policy
from tests import tiny
from tts.drafting import chain
from tts.engine import MAX_LAG, SpeculativeDecoder

PROMPT = torch.tensor([[3, 17, 5, 40, 9]])
ARCHITECTURES = ["llama3.1", "qwen3", "qwen3.5", "sliding"]


def decode(pair, gamma, config, acceptance="coupled", seed=0, prompt=PROMPT, **kwargs):
    decoder = SpeculativeDecoder(
        pair, policy=make_policy("fixed", gamma=gamma), acceptance=acceptance, **kwargs
    )
    return decoder.generate(prompt, generation_config=config, seed=seed)


def greedy(new=100, **fields):
    return GenerationConfig(max_new_tokens=new, do_sample=False, **fields)


def sampled(new=60, **fields):
    fields = {"temperature": 0.9, "top_k": 0, "top_p": 0.95} | fields
    return GenerationConfig(max_new_tokens=new, do_sample=True, **fields)


def check_greedy_equals_target(architecture):
    """Every gamma equals `target.generate`, and nothing interesting was missed on the way."""
    pair = tiny.pair(architecture, noise=0.03)
    outcomes, rates = set(), []
    for fields in ({}, {"repetition_penalty": 1.3}):
        for prompt in (PROMPT, torch.tensor([[61, 2]])):
            config = greedy(**fields)
            expected = pair.target.generate(prompt, generation_config=config, do_sample=False)
            eos = int(expected[0, -25])  # a token that comes: the text ends inside a block
            for gamma in (0, 1, 4, 8):
                result = decode(pair, gamma, config, prompt=prompt)
                assert result.sequences.tolist() == expected.tolist()
                outcomes |= {(r.num_drafted, r.num_accepted) for r in result.rounds}
                rates.append(result.summary().draft_acceptance_rate)
                cut = decode(pair, gamma, greedy(eos_token_id=eos, **fields), prompt=prompt)
                ended = pair.target.generate(
                    prompt, generation_config=greedy(eos_token_id=eos, **fields)
                )
                assert cut.sequences.tolist() == ended.tolist()
                last = cut.rounds[-1]
                if last.num_emitted <= last.num_accepted:
                    outcomes.add("eos inside")
    for gamma in (1, 4, 8):
        for accepted in range(gamma + 1):
            assert (gamma, accepted) in outcomes, f"no round accepted {accepted} of {gamma}"
    assert "eos inside" in outcomes
    rate = [r for r in rates if r is not None]
    assert 0.3 <= sum(rate) / len(rate) <= 0.8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_the_target_alone(architecture):
    check_greedy_equals_target(architecture)


def check_coupled_text_is_one(architecture):
    """One text for every gamma and every draft."""
    target = tiny.model(architecture)
    tokenizer = tiny.tokenizer()
    texts = set()
    for noise in (0.1, 0.4):
        pair = tiny.ModelPair(target, tiny.noisy(target, noise), tokenizer, "tiny")
        for gamma in (0, 1, 4):
            result = decode(pair, gamma, sampled(repetition_penalty=1.3), seed=5)
            texts.add(tuple(result.tokens))
    assert len(texts) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_coupled_text_depends_on_neither_gamma_nor_draft(architecture):
    check_coupled_text_is_one(architecture)


def test_coupled_text_depends_on_the_seed():
    pair = tiny.pair()
    assert decode(pair, 3, sampled(), seed=1).tokens != decode(pair, 3, sampled(), seed=2).tokens


def check_one_overlap_curve(pair, gammas, length, **kwargs):
    """Overlap is measured once at each position, and is the same for every gamma."""
    curves = []
    for gamma in gammas:
        result = decode(pair, gamma, sampled(length), seed=3, **kwargs)
        points = sorted(
            (position, value)
            for r in result.rounds
            for position, value in zip(r.overlap_position, r.overlap, strict=True)
        )
        assert [position for position, _ in points] == list(range(length))
        curves.append(torch.tensor([value for _, value in points]))
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], atol=1e-4, rtol=0)


def check_overlap_is_the_same_for_every_gamma(architecture, **kwargs):
    """Overlap at each position is a fact about the two models, not about the speculation."""
    check_one_overlap_curve(tiny.pair(architecture), (0, 1, 4), 60, **kwargs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_overlap_is_measured_once_at_every_position_whatever_gamma(architecture):
    check_overlap_is_the_same_for_every_gamma(architecture)


def test_overlap_under_a_draft_window_is_the_same_for_every_gamma():
    check_overlap_is_the_same_for_every_gamma("llama3.1", draft_window=8)


def test_a_window_longer_than_the_text_changes_nothing_and_a_short_one_does():
    pair = tiny.pair(noise=0.1)
    full = decode(pair, 4, sampled(), seed=3).summary().mean_overlap
    wide = decode(pair, 4, sampled(), seed=3, draft_window=100).summary().mean_overlap
    narrow = decode(pair, 4, sampled(), seed=3, draft_window=2).summary().mean_overlap
    assert wide == pytest.approx(full, abs=1e-6)
    assert narrow != pytest.approx(full, abs=1e-3)


def test_a_recorded_path_is_committed_and_its_mismatches_are_counted():
    pair = tiny.pair()
    path = decode(pair, 0, sampled(), seed=7).tokens
    for gamma in (0, 4):
        decoder = SpeculativeDecoder(
            pair, policy=make_policy("fixed", gamma=gamma), acceptance="coupled"
        )
        same = decoder.generate(PROMPT, generation_config=sampled(), seed=7, path=path)
        assert same.tokens == path
        assert same.summary().path_mismatches == 0
        other = [*path[:30], (path[30] + 1) % 64, *path[31:]]
        forced = decoder.generate(PROMPT, generation_config=sampled(), seed=7, path=other)
        assert forced.tokens == other
        assert forced.summary().path_mismatches >= 1


def test_a_path_accepts_exactly_the_drafts_that_equal_it():
    pair = tiny.pair()
    free = decode(pair, 4, sampled(), seed=7)
    decoder = SpeculativeDecoder(pair, policy=make_policy("fixed"), acceptance="coupled")
    forced = decoder.generate(PROMPT, generation_config=sampled(), seed=7, path=free.tokens)
    assert [r.num_accepted for r in forced.rounds] == [r.num_accepted for r in free.rounds]


def test_a_session_goes_on_as_if_the_prompt_had_been_whole():
    pair = tiny.pair("qwen3.5")
    config = greedy(20)
    decoder = SpeculativeDecoder(pair, policy=make_policy("fixed", gamma=3))
    session = decoder.session()
    first = decoder.generate(PROMPT, generation_config=config, session=session)
    more = torch.tensor([[8, 8, 30]])
    second = decoder.generate(more, generation_config=config, session=session)
    whole = torch.cat([first.sequences, more], 1)
    expected = pair.target.generate(whole, generation_config=config)
    assert second.sequences.tolist() == expected.tolist()
    assert second.rounds[0].position == 20


def test_generation_ends_at_the_budget_and_at_the_context():
    pair = tiny.pair()
    assert len(decode(pair, 8, greedy(13)).tokens) == 13
    prompt = torch.randint(0, 64, (1, 500))
    result = decode(pair, 8, greedy(100), prompt=prompt)
    assert result.sequences.shape[1] == 512
    assert result.finish_reason == "length"


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_same_seed_same_text_under_rules_of_chance(rule):
    pair = tiny.pair()
    texts = [decode(pair, 3, sampled(), rule, seed=4).tokens for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0] != decode(pair, 3, sampled(), rule, seed=5).tokens


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_every_draft_on_the_path_has_a_label(rule):
    outcomes = []
    policy = make_policy("fixed", gamma=3)
    policy.observe = outcomes.append
    decoder = SpeculativeDecoder(tiny.pair(noise=0.2), policy=policy, acceptance=rule)
    for seed in range(4):
        decoder.generate(PROMPT, generation_config=sampled(), seed=seed)
    for outcome in outcomes:
        labels = outcome.acceptance()
        assert len(labels) == min(outcome.num_accepted + 1, outcome.num_drafted)
        assert all(0 <= label <= 1 + 1e-6 for label in labels)
    assert {outcome.num_accepted for outcome in outcomes} == {0, 1, 2, 3}


def test_streamer_gets_the_prompt_and_every_token_once():
    class Collect:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    pair, streamer = tiny.pair(), Collect()
    decoder = SpeculativeDecoder(pair, policy=make_policy("fixed"), acceptance="greedy")
    result = decoder.generate(PROMPT, generation_config=greedy(20), streamer=streamer)
    assert streamer.got == result.sequences[0].tolist()
    assert streamer.ended


def test_reading_what_earlier_rounds_left_unread_is_no_cost_of_a_rounds_length(monkeypatch):
    pair, events = tiny.pair("llama3.1"), []
    policy = make_policy("fixed", gamma=0)
    decoder = SpeculativeDecoder(pair, policy=policy, acceptance="coupled")
    session = decoder.session()
    catch_up = session.drafter.catch_up
    monkeypatch.setattr(policy, "observe", lambda outcome: events.append("observed"))
    monkeypatch.setattr(
        session.drafter, "catch_up", lambda *said: events.append("caught up") or catch_up(*said)
    )
    decoder.generate(PROMPT, generation_config=greedy(5), session=session)
    assert events == ["observed"] * 5 + ["caught up"]


def test_time_that_a_policy_takes_is_policy_time(monkeypatch):
    now, pair, policy = [0.0], tiny.pair("llama3.1", noise=0.03), make_policy("fixed", gamma=3)

    def slower(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)

        return slow

    monkeypatch.setattr("tts.stopwatch.Stopwatch._now", lambda self: now[0])
    monkeypatch.setattr("tts.drafting.chain.signals", slower(10.0, chain.signals))
    monkeypatch.setattr(policy, "proceed", slower(1.0, policy.proceed))
    decoder = SpeculativeDecoder(pair, policy=policy, acceptance="coupled")
    result = decoder.generate(PROMPT, generation_config=sampled(20))
    assert any(r.num_drafted == 3 for r in result.rounds)
    for r in result.rounds:
        questions = max(0, r.num_drafted - 1)  # the plan's last token needs none
        assert (r.policy_ms, r.verify_ms) == (1000.0 * questions, 0.0)
        assert r.draft_ms == 10_000.0 * r.num_drafted


def test_overlap_behind_an_end_inside_a_block_is_not_counted():
    pair, inside = tiny.pair(noise=0.03), 0
    for eos in decode(pair, 0, greedy()).tokens[60:80]:
        result = decode(pair, 8, greedy(eos_token_id=eos))
        inside += result.rounds[-1].num_emitted <= result.rounds[-1].num_accepted
        positions = sorted(p for r in result.rounds for p in r.overlap_position)
        assert positions == list(range(len(result.tokens)))
    assert inside


def test_overlap_waits_for_so_many_positions_at_most():
    rounds = decode(tiny.pair(), 0, sampled(MAX_LAG + 20)).rounds
    assert [len(r.overlap) for r in rounds if r.overlap] == [MAX_LAG, 20]


def test_nothing_is_drafted_that_could_not_be_kept():
    pair = tiny.pair(noise=0.0)  # whatever is drafted is accepted
    prompt = torch.randint(0, 64, (1, 500), generator=torch.Generator().manual_seed(0))
    for config in (greedy(12), greedy(100)):
        result = decode(pair, 8, config, prompt=prompt)
        assert (result.sequences.shape[1], result.finish_reason) == (512, "length")
        assert all(r.num_emitted == r.num_accepted + 1 for r in result.rounds)


def test_the_time_of_the_prompt_is_that_of_the_first_round():
    times = [r.prefill_ms for r in decode(tiny.pair(), 2, greedy(20)).rounds]
    assert times[0] > 0
    assert set(times[1:]) == {0.0}
