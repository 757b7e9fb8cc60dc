"""Warping equals transformers' own processors; the acceptance rules and the noise keep promises."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

from tests import tiny
from tts.acceptance import (
    FEW,
    Block,
    Common,
    Coupled,
    Recorded,
    Rejection,
    exponential_noise,
    match_probability,
    on_common_ids,
    overlap,
)
from tts.sampling import Distribution, Warper
from tts.settings import Sampling, resolve

SETTINGS = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": True},  # top_k None means 50
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9},
    {"do_sample": True, "temperature": 1.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1},
    {"do_sample": True, "top_k": 0, "min_p": 0.3},
    {"do_sample": True, "top_k": 5, "repetition_penalty": 0.8, "suppress_tokens": [1, 2, 9]},
    {"do_sample": True, "top_k": 0, "eos_token_id": 4, "min_new_tokens": 3},
    {"do_sample": True, "top_k": 0, "begin_suppress_tokens": [0, 3, 5]},
]


def dense(rows: list[Distribution], width: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([row.over(np.arange(width)) for row in rows]))


def listed(ids, probs) -> Distribution:
    return Distribution(np.array(ids), np.array(probs, np.float32))


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [64, 5000])
def test_warping_equals_transformers_row_by_row(fields, vocab):
    torch.manual_seed(0)
    target = tiny.model("llama3.1", 64)
    config = GenerationConfig(max_new_tokens=50, **fields)
    prompt = [3, 9, 9, 20]
    sequence = [*prompt, 7, 3, 11, 0, 5]
    logits = torch.randn(6, vocab) * 2
    sampling, _ = resolve(target, config, len(prompt))
    ours = dense(Warper(sampling, len(prompt))(logits, sequence, len(prompt)), vocab)

    resolved, _ = target._prepare_generation_config(config)
    target._prepare_special_tokens(resolved, device=torch.device("cpu"))
    processors = target._get_logits_processor(resolved, len(prompt), device="cpu")
    for row in range(6):
        prefix = torch.tensor([sequence[: len(prompt) + row]])
        scores = processors(prefix, logits[row : row + 1].clone())
        if fields["do_sample"]:
            theirs = scores.softmax(-1)[0]
        else:
            theirs = torch.nn.functional.one_hot(scores.argmax(), vocab).float()
        torch.testing.assert_close(ours[row], theirs, atol=1e-5, rtol=1e-4)


def test_a_nucleus_wider_than_the_first_look_is_found():
    logits = torch.zeros(2, 20_000)
    kept = Warper(Sampling(1.0, top_p=0.5), 0)(logits[:, :9000] + torch.rand(9000) * 0.1, [], 0)
    assert min(len(row.ids) for row in kept) > 4000
    assert [row.probs.sum() for row in kept] == pytest.approx([1, 1])


def test_a_nucleus_is_of_the_mass_of_the_top_k_wherever_they_lie():
    probs = torch.tensor([0.9465, *[0.0055] * 9, *[9e-5] * 40])
    logits = (probs / probs.sum()).log()[None]
    config = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    (row,) = Warper(Sampling(**config), 0)(logits, [], 0)
    theirs = TopPLogitsWarper(0.95)(None, TopKLogitsWarper(50)(None, logits))
    assert len(row.ids) >= int(theirs.isfinite().sum()) == 2  # and what is tied with the last


def test_what_lies_below_the_floors_of_the_first_looks_is_found():
    torch.manual_seed(0)
    flat = torch.rand(20_000) * 0.1  # every id is below the first floor
    (row,) = Warper(Sampling(1.0, top_p=0.5), 0)(flat[None], [], 0)
    every = flat.softmax(0).sort(descending=True)
    count = int((every.values.cumsum(0) < 0.5).sum()) + 1
    assert set(row.ids) == set(every.indices[:count].tolist())
    peaked = torch.linspace(-60, -50, 30)  # all but one below every floor that is positive
    peaked[7] = 0.0
    (row,) = Warper(Sampling(1.0, top_k=4), 0)(peaked[None], [], 0)
    assert row.ids.tolist() == [7, 29, 28, 27]


def test_reduced_columns_give_the_full_width_distribution():
    torch.manual_seed(0)
    columns = torch.tensor([1, 4, 5, 9, 30, 31])
    logits = torch.randn(3, 6)
    wide = torch.full((3, 40), float("-inf")).index_copy(1, columns, logits)
    settings = Sampling(0.8, top_k=4, top_p=0.9, repetition_penalty=1.4, suppress_tokens=(5, 6))
    sequence = [4, 9, 2, 30, 1]
    reduced = Warper(settings, 2, columns)(logits, sequence, 3)
    full = Warper(settings, 2)(wide, sequence, 3)
    torch.testing.assert_close(dense(reduced, 40), dense(full, 40))


def test_logits_are_not_written_to():
    logits = torch.randn(2, 30)
    before = logits.clone()
    settings = Sampling(0.8, 5, 0.9, 0.01, 1.3, (1, 2), (3,), (4,), 9)
    Warper(settings, 1)(logits, [1, 2, 3], 1)
    assert torch.equal(logits, before)


def test_overlap_by_hand():
    p = listed([4, 1, 7], [0.5, 0.3, 0.2])
    q = listed([1, 4, 2], [0.6, 0.1, 0.3])
    assert overlap(on_common_ids([p, q], [q, listed([9], [1.0])])) == pytest.approx([0.4, 0.0])


def test_probabilities_are_found_by_id():
    row = listed([5, 0, 2], [0.5, 0.25, 0.25])
    assert [row.of(token) for token in range(7)] == [0.25, 0, 0.25, 0, 0, 0.5, 0]
    assert row.over(np.array([9, 5, 1, 0])).tolist() == [0, 0.5, 0, 0.25]


def test_noise_is_exponential_and_a_function_of_all_three_keys():
    ids, positions = np.arange(2000), np.arange(50, dtype=np.uint64)[:, None]
    noise = exponential_noise(3, positions, ids)
    assert noise.dtype == np.float64
    assert noise.min() > 0
    assert noise.mean() == pytest.approx(1, abs=0.02)
    assert noise.var() == pytest.approx(1, abs=0.05)
    assert (noise > 3).mean() == pytest.approx(0.0498, abs=0.003)
    # neighbours in any key are uncorrelated
    for other in (
        exponential_noise(4, positions, ids),
        exponential_noise(3, positions + np.uint64(1), ids),
        exponential_noise(3, positions, ids + 1),
    ):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02
    assert noise[7, 5:6].tolist() == exponential_noise(3, 7, ids[5:6]).tolist()


def test_noise_stays_what_recorded_paths_were_written_with():
    noise = exponential_noise(3, 7, np.array([5, 49151]))
    assert noise.tolist() == pytest.approx([2.0138344192581457, 0.29250839385407257], rel=1e-12)


def test_coupled_choices_follow_p():
    p = listed([2, 5, 8], [0.6, 0.3, 0.1])
    counts = dict.fromkeys((2, 5, 8), 0)
    for seed in range(4000):
        counts[Coupled(seed).draw(p, 11)] += 1
    for token, share in ((2, 0.6), (5, 0.3), (8, 0.1)):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.025)


def test_coupled_match_probability_is_the_published_one():
    """P(match) = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) (Daliri et al. 2024)."""
    p, q = listed([0, 1, 2], [0.5, 0.3, 0.2]), listed([0, 1, 2], [0.2, 0.3, 0.5])
    expected = naive_match(p.probs, q.probs)
    assert match_probability(on_common_ids([p], [q])) == pytest.approx([expected])
    matches = sum(Coupled(s).draw(p, 0) == Coupled(s).draw(q, 0) for s in range(6000))
    assert matches / 6000 == pytest.approx(expected, abs=0.02)


def naive_match(p, q):
    """The published sum over dense rows, term by term."""
    both = [(x, y) for x, y in zip(p.tolist(), q.tolist(), strict=True)]
    return sum(
        1 / sum(max(a / x, b / y) for a, b in both) for x, y in both if x > 0 and y > 0
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(
        st.tuples(st.sampled_from([0, 0, 1, 2, 5]), st.sampled_from([0, 0, 1, 3, 4])),
        min_size=2,
        max_size=9,
    ).filter(lambda w: all(sum(column) for column in zip(*w, strict=True)))
)
def test_match_probability_is_the_sum_over_all_pairs(weights):
    """With ids in only one of the supports, ties, and none in common."""
    both = np.array(weights, dtype=float).T
    both /= both.sum(-1, keepdims=True)
    rows = [listed(kept := probs.nonzero()[0][::-1], probs[kept]) for probs in both]
    (common,) = on_common_ids(rows[:1], rows[1:])
    wide = Common(*(np.pad(x, (0, FEW)) for x in common))  # is summed up in another way
    expected = naive_match(*both)
    assert match_probability([common, wide]) == pytest.approx([expected, expected], abs=1e-6)


def test_match_probability_of_distributions_as_wide_as_the_vocabulary():
    p = listed(np.arange(49152), torch.rand(49152).softmax(-1))
    assert match_probability(on_common_ids([p], [p])) == pytest.approx([1.0])


def test_rejection_accepts_with_min_one_p_over_q_and_redraws_the_rest():
    p = [listed([0, 1, 2], [0.2, 0.8, 0.0]), listed([0, 1, 2], [0.0, 0.0, 1.0])]
    q = [listed([0, 1, 2], [0.5, 0.5, 0.0])]
    verdicts = [Rejection(seed).judge(p, q, [0], 5) for seed in range(4000)]
    kept = [v for v in verdicts if v.num_accepted == 1]
    assert len(kept) / 4000 == pytest.approx(0.2 / 0.5, abs=0.03)
    assert {v.token for v in kept} == {2}
    assert {v.token for v in verdicts if v.num_accepted == 0} == {1}
    assert all(Rejection(s).judge(p, q, [1], 5).num_accepted == 1 for s in range(50))


@pytest.mark.parametrize("rule", [Rejection, Block])
def test_a_draft_that_is_the_target_but_for_rounding_may_be_rejected(rule):
    """Once in ten million times; nothing is left of p then."""
    p, q = listed([3, 4], [0.5, np.float32(0.5) - np.float32(2**-25)]), listed([3, 4], [0.5, 0.5])
    made = rule(0)
    made._random = SimpleNamespace(random=lambda: 1 - 2**-53)
    assert made.judge([p, p], [q], [4], 5) == (0, 4, 0)


def test_a_likely_token_makes_up_for_an_unlikely_one_before_it():
    """Token by token two fifths of these blocks would be kept: r is 1, .4, 1."""
    p = [listed([0, 1], [0.2, 0.8]), listed([0, 1], [1.0, 0.0]), listed([5], [1.0])]
    q = [listed([0, 1], [0.5, 0.5]), listed([0, 1], [0.4, 0.6])]
    assert all(Block(s).judge(p, q, [0, 0], 5)[:2] == (2, 5) for s in range(50))
    # all of the .4 that may begin with 0 went on with 0
    assert all(Block(s).judge(p, q, [0, 1], 5)[:2] == (0, 1) for s in range(50))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([1, 2, 5, 9])] * 3), min_size=4, max_size=4))
def test_the_labels_of_a_block_sum_up_to_what_is_kept_of_it(weights):
    """Over all blocks of two, for each label's offset is reached as often as r says."""
    rows = [listed(range(3), np.array(w) / sum(w)) for w in weights]
    p, q = rows[:2], rows[2:]
    common = on_common_ids(p, q)
    labelled = first = second = 0.0
    for drafts in product(range(3), repeat=2):
        drawn = q[0].of(drafts[0]) * q[1].of(drafts[1])
        ratios = [mine.of(x) / other.of(x) for mine, other, x in zip(p, q, drafts, strict=True)]
        kept = min(1.0, ratios[0])
        labels = Block(0).probability(common, drafts)
        labelled += drawn * (labels[0] + kept * labels[1])
        first += drawn * kept
        second += drawn * min(1.0, kept * ratios[1])
    one, two = overlap(common)
    assert first == pytest.approx(one, abs=1e-5)
    assert labelled == pytest.approx(first + second, abs=1e-5)
    assert second >= one * two - 1e-5  # token by token


def test_a_recorded_path_is_followed_and_compared():
    p = [listed([token], [1.0]) for token in (3, 4, 5)]
    rule = Recorded([9, 3, 4, 6, 7], 10, Coupled(0))
    verdict = rule.judge(p, [], [3, 4], 11)
    assert verdict == (2, 6, 1)
    assert rule.judge(p, [], [8, 4], 11) == (0, 3, 0)
