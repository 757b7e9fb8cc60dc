"""Copying drafts: the right match, and the target's own text whatever was copied."""

from itertools import pairwise

import pytest
import torch

from controllers import make_policy
from controllers.fixed import Fixed
from tests import tiny
from tests.heads import PAIRS
from tests.test_drafters import EAGER
from tests.test_engine import PROMPT, check_one_overlap_curve, decode, greedy, sampled
from tests.test_laws import ALPHA, VOCAB, honest, learning, p_value, small_pair
from tts.distill.config import DistillConfig
from tts.drafting.prompt_lookup import PromptLookup, PromptLookupDrafter
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.models import ModelPair, load_pair


def copying(architecture="llama3.1", vocab=64):
    """A pair whose target repeats itself, so that there is something to copy."""
    target = tiny.model(architecture, vocab=vocab)
    return ModelPair(target, PromptLookup(), tiny.tokenizer(vocab), "tiny+prompt_lookup")


def proposed(sequence, gamma=4, **fields):
    drafter = PromptLookupDrafter(PromptLookup(**fields))
    return drafter.propose(sequence, gamma, 0, None, lambda signals: True).tokens


def test_the_longest_match_wins_and_among_equals_the_most_recent():
    assert proposed([1, 2, 3, 9, 5, 3, 8, 7, 1, 2, 3]) == [9, 5, 3, 8]  # three tokens match
    assert proposed([4, 2, 3, 9, 4, 2, 3, 7, 2, 3], gamma=2) == [7, 2]  # the later of two
    assert proposed([4, 3, 9, 5, 3], gamma=1) == [9]  # one token has to do
    assert proposed([1, 2, 3, 9, 1, 2, 3], longest=1, gamma=1) == [9]
    assert proposed([1, 2, 3]) == []


def test_the_newest_token_does_not_match_itself_and_a_copy_may_be_copied():
    assert proposed([5]) == []
    assert proposed([5, 5]) == [5, 5, 5, 5]
    assert proposed([6, 7, 6], gamma=5) == [7, 6, 7, 6, 7]


def test_a_match_may_have_to_be_longer():
    assert proposed([4, 3, 9, 5, 3], shortest=2) == []
    assert proposed([4, 3, 9, 5, 4, 3], gamma=2, shortest=2) == [9, 5]
    with pytest.raises(UserError, match="lookup: a match of 3 to 2 tokens"):
        PromptLookup(shortest=3, longest=2)


def test_drafts_are_forgotten_once_they_are_judged():
    drafter = PromptLookupDrafter(PromptLookup())
    for _ in range(2):
        drafts = drafter.propose([1, 2, 3, 1, 2], 3, 0, None, lambda signals: True)
        assert drafts.tokens == [3, 1, 2]
    after = drafter.propose([1, 2, 3, 1, 2, 9, 3], 3, 0, None, lambda signals: True)
    assert after.tokens == [1, 2, 9]  # had "3 1 2" stayed, "2" would be followed by 3


def test_a_copy_says_how_often_its_like_held():
    def confidence(sequence):
        drafter = PromptLookupDrafter(PromptLookup())
        return drafter.propose(sequence, 1, 0, None, lambda signals: True).signals[0].confidence

    assert confidence([7, 8, 9, 7]) == pytest.approx(0.2)  # nothing was seen yet: 1 - 0.8
    assert confidence([7, 8, 9, 8, 9, 8]) > 0.3  # 9 followed 8 again
    assert confidence([7, 8, 9, 8, 5, 8]) < 0.2


@pytest.mark.parametrize("lookup", [None, PromptLookup()])
def test_copies_come_from_before_the_window_of_a_model(lookup):
    pair = copying() if lookup is None else tiny.pair("llama3.1")
    decoder = SpeculativeDecoder(pair, policy=Fixed(1), draft_window=2, lookup=lookup)
    assert decoder.session().drafter.at_hand([3, 9, 1, 1, 2, 2, 4, 3]) is not None
    assert decoder.session().drafter.at_hand([3, 9, 1, 1, 2, 2, 4, 5]) is None


def test_greedy_text_is_the_targets_and_something_was_copied():
    pair = copying()
    expected = pair.target.generate(PROMPT, generation_config=greedy(200), do_sample=False)
    for gamma in (0, 1, 4, 8):
        result = decode(pair, gamma, greedy(200))
        assert result.sequences.tolist() == expected.tolist()
        accepted = sum(r.num_accepted for r in result.rounds)
        assert (accepted > 20) == (gamma > 0)


def test_coupled_text_is_that_of_a_model_draft():
    pair, usual = copying(), tiny.pair("llama3.1", noise=0.03)
    texts = [decode(p, gamma, sampled(), seed=5).tokens for p in (pair, usual) for gamma in (0, 4)]
    assert all(text == texts[0] for text in texts)


def test_overlap_is_known_at_every_position():
    result = decode(copying(), 4, sampled(100))
    positions = sorted(p for r in result.rounds for p in r.overlap_position)
    assert positions == list(range(100))
    values = [x for r in result.rounds for x in r.overlap]
    assert 0 in values
    assert max(values) > 0.5


@pytest.mark.parametrize("samples", [1500, pytest.param(4000, marks=pytest.mark.slow)])
def test_rejection_of_point_masses_keeps_the_law(samples):
    target = tiny.model("llama3.1", vocab=VOCAB, layers=1)
    pair = ModelPair(target, PromptLookup(), tiny.tokenizer(VOCAB), "tiny+prompt_lookup")
    assert p_value(pair, samples, honest) > ALPHA


def test_a_copying_draft_has_nothing_to_train():
    with pytest.raises(UserError, match="prompt_lookup copies"):
        SpeculativeDecoder(copying(), policy=make_policy("fixed"), distill=DistillConfig())


def test_the_loader_knows_it_by_name(tmp_path):
    folder = tiny.save(tiny.model("llama3.1"), tmp_path / "target")
    pair = load_pair(str(folder), "prompt_lookup", dtype="float32")
    result = decode(pair, 4, sampled(20), prompt=torch.tensor([[3, 5, 3, 5, 3]]))
    assert len(result.tokens) == 20


LOOKUP = PromptLookup(shortest=2, longest=4)  # of 64 tokens, a short one matches often enough


@pytest.fixture(params=["autoregressive", *PAIRS])
def family(request):
    return PAIRS.get(request.param, lambda **kwargs: tiny.pair("llama3.1", noise=0.1))


class Watched(Fixed):
    """Notes which drafts of each round are copies."""

    def __init__(self, gamma):
        super().__init__(gamma)
        self.kinds = []

    def observe(self, outcome):
        self.kinds.append(tuple(s.copied for s in outcome.signals))


def test_a_model_drafts_where_nothing_matches_and_hands_over_where_something_does(family):
    watched = Watched(4)
    decoder = SpeculativeDecoder(family(), policy=watched, acceptance="coupled", lookup=LOOKUP)
    result = decoder.generate(PROMPT, generation_config=sampled(200), seed=5)
    kinds = watched.kinds
    assert [r.num_copied for r in result.rounds] == [sum(k) for k in kinds]
    assert any(k and all(k) for k in kinds)
    assert any(k and not any(k) for k in kinds)
    assert any(k and k[-1] and not k[0] for k in kinds)
    assert not any(later < earlier for k in kinds for earlier, later in pairwise(k))


def test_beside_a_model_the_text_is_the_targets_with_and_without_updates(family):
    made = family()
    for fields in ({}, {"repetition_penalty": 1.3}):
        config = greedy(80, **fields)
        expected = made.target.generate(PROMPT, generation_config=config, do_sample=False)
        for gamma in (1, 4, 8):
            result = decode(made, gamma, config, lookup=LOOKUP)
            assert result.sequences.tolist() == expected.tolist()
        learned = decode(made, 4, config, lookup=LOOKUP, distill=EAGER)
        assert learned.sequences.tolist() == expected.tolist()
        assert learned.summary().num_updates > 5
    texts = [
        decode(made, gamma, sampled(), seed=5, **kwargs).tokens
        for gamma in (0, 4)
        for kwargs in ({}, {"lookup": LOOKUP}, {"lookup": LOOKUP, "distill": EAGER})
    ]
    assert all(text == texts[0] for text in texts)


def test_beside_a_model_overlap_is_known_once_and_does_not_depend_on_gamma(family):
    # heads and blocks say another thing at another offset
    gammas = (0, 1) if family in PAIRS.values() else (0, 1, 5)
    check_one_overlap_curve(family(), gammas, 100, lookup=LOOKUP)


def test_beside_a_model_with_recurrent_layers_the_text_is_the_targets():
    made = tiny.pair("qwen3.5")
    expected = made.target.generate(PROMPT, generation_config=greedy(80), do_sample=False)
    for gamma in (1, 4):
        result = decode(made, gamma, greedy(80), lookup=LOOKUP)
        assert result.sequences.tolist() == expected.tolist()
        assert sum(r.num_copied for r in result.rounds) > 0


@pytest.mark.parametrize(
    ("decoder", "samples"),
    [(honest, 1500), pytest.param(learning, 3000, marks=pytest.mark.slow)],
)
def test_beside_a_model_rejection_keeps_the_law(decoder, samples):
    def copying_too(pair):
        made = decoder(pair)
        made._lookup = PromptLookup(longest=2)
        return made

    assert p_value(small_pair(), samples, copying_too) > ALPHA


def test_old_copies_are_forgotten():
    drafter = PromptLookupDrafter(PromptLookup(longest=1))
    text = [7, 8] * 1000
    drafter._follow(text)
    assert drafter.at_hand(text) > 0.95
    for new in range(100, 500):
        text += [7, new]
    assert drafter.at_hand([*text, 7]) < 0.5
