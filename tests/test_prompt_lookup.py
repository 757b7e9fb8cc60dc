"""Copying drafts: the right match, and the target's own text whatever was copied."""

import pytest
import torch

from controllers import make_policy
from tests import tiny
from tests.test_engine import PROMPT, decode, greedy, sampled
from tests.test_laws import ALPHA, VOCAB, honest, p_value
from tts.distill.config import DistillConfig
from tts.drafting.prompt_lookup import PromptLookup, PromptLookupDrafter
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.models import ModelPair, load_pair


def copying(architecture="llama3.1", vocab=64):
    """A pair whose target repeats itself, so that there is something to copy."""
    target = tiny.model(architecture, vocab=vocab)
    return ModelPair(target, PromptLookup(), tiny.tokenizer(vocab), "tiny+prompt_lookup")


def proposed(sequence, gamma=4, window=None, **fields):
    drafter = PromptLookupDrafter(PromptLookup(**fields), window)
    return drafter.propose(sequence, gamma, 0, None, lambda signals: True).tokens


def test_the_longest_match_wins_and_among_equals_the_most_recent():
    assert proposed([1, 2, 3, 9, 5, 3, 8, 7, 1, 2, 3]) == [9, 5, 3, 8]  # three tokens match
    assert proposed([4, 2, 3, 9, 4, 2, 3, 7, 2, 3], gamma=2) == [7, 2]  # the later of two
    assert proposed([4, 3, 9, 5, 3], gamma=1) == [9]  # one token has to do
    assert proposed([1, 2, 3, 9, 1, 2, 3], longest=1, gamma=1) == [9]
    assert proposed([1, 2, 3]) == []


def test_the_newest_token_does_not_match_itself_and_a_copy_may_end_early():
    assert proposed([5, 5], gamma=4) == [5]
    assert proposed([6, 7, 6], gamma=4) == [7, 6]


def test_a_window_forgets_old_matches():
    sequence = [3, 9, 1, 1, 2, 2, 4, 3]
    assert proposed(sequence, gamma=1) == [9]
    assert proposed(sequence, gamma=1, window=5) == []


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


def test_rejection_of_point_masses_keeps_the_law():
    target = tiny.model("llama3.1", vocab=VOCAB, layers=1)
    pair = ModelPair(target, PromptLookup(), tiny.tokenizer(VOCAB), "tiny+prompt_lookup")
    assert p_value(pair, 4000, honest) > ALPHA


def test_a_copying_draft_has_nothing_to_train():
    with pytest.raises(UserError, match="prompt_lookup copies"):
        SpeculativeDecoder(copying(), policy=make_policy("fixed"), distill=DistillConfig())


def test_the_loader_knows_it_by_name(tmp_path):
    folder = tiny.save(tiny.model("llama3.1"), tmp_path / "target")
    pair = load_pair(str(folder), "prompt_lookup", dtype="float32")
    result = decode(pair, 4, sampled(20), prompt=torch.tensor([[3, 5, 3, 5, 3]]))
    assert len(result.tokens) == 20
