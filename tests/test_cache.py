"""Whatever is fed and taken back, the cache says what a fresh prefill would say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

from tests import tiny
from tts.attention import whole_steps
from tts.cache import BLOCK, RollbackCache, RollbackLayer, _rollback
from tts.cached_model import CHUNK, CachedModel
from tts.errors import UserError

# the chunked and the stepwise form of linear attention round differently; a wrong state is off by 1
CLOSE = {"atol": 1e-3, "rtol": 1e-3}
MODELS = {name: tiny.model(name) for name in ("llama3.1", "qwen3.5", "sliding")}
moves = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7)), min_size=1, max_size=6)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("window", [None, 5])
@settings(max_examples=25, deadline=None)
@given(moves=moves, seed=st.integers(0, 1000))
def test_rolled_back_state_equals_that_of_a_fresh_prefill(architecture, window, moves, seed):
    random = torch.Generator().manual_seed(seed)
    model = MODELS[architecture]
    cached, sequence = CachedModel(model, window), []
    for fed, dropped in moves:
        cached.mark()
        block = torch.randint(0, 64, (fed,), generator=random).tolist()
        cached.feed(block)
        sequence = sequence + block[: max(0, fed - dropped)]
        cached.rollback(len(sequence))
        assert cached.length == len(sequence)
    probe = [5, 9, 2]
    fresh = CachedModel(model, window)
    expected = fresh.feed(sequence + probe, keep=3)
    got = cached.feed(probe, keep=3)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.hidden, expected.hidden, **CLOSE)
    for ours, theirs in zip(cached.cache.snapshot(), fresh.cache.snapshot(), strict=True):
        for kind in ("conv", "recurrent"):
            torch.testing.assert_close(ours[kind][0], theirs[kind][0], **CLOSE)


@pytest.mark.parametrize("keep", [1, 32, CHUNK + 8])
@pytest.mark.parametrize("more", [1, 2, 31, 32, 33])
def test_a_long_prompt_in_pieces_gives_all_rows_asked_for(keep, more):
    tokens = torch.randint(0, 64, (CHUNK + more + max(0, keep - CHUNK),)).tolist()
    cached = CachedModel(tiny.model("llama3.1"), layers=(1,))
    rows = cached.feed(tokens, keep=keep)
    with torch.inference_mode():
        expected = cached.model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(rows.logits, expected[-keep:], atol=2e-5, rtol=1e-4)
    assert len(rows.features) == cached.length == len(tokens)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 33, 2 * BLOCK])
def test_there_is_room_up_to_the_next_step_of_attention(length):
    layer = RollbackLayer()
    for size in (length - 1, 1):
        keys, _ = layer.update(*torch.zeros(2, 1, 1, size, 8))
    room = keys.untyped_storage().nbytes() // (8 * keys.element_size())
    assert keys.shape[2] == length
    assert room >= whole_steps(length)


def test_a_window_hides_older_positions_from_every_row_of_a_block():
    model, tokens = MODELS["llama3.1"], list(range(12))
    one_by_one = CachedModel(model, window=4)
    rows = [one_by_one.feed([token]).logits[0] for token in tokens]
    block = CachedModel(model, window=4).feed(tokens, keep=12).logits
    torch.testing.assert_close(block, torch.stack(rows), atol=2e-5, rtol=1e-4)
    # two layers with windows of 4 see 7 positions back, not 10
    far = CachedModel(model, window=4).feed([63, 63, *tokens[2:]], keep=1).logits
    torch.testing.assert_close(far[0], rows[-1], atol=2e-5, rtol=1e-4)


def test_growing_keeps_the_content_and_rollback_copies_nothing():
    layer = RollbackLayer()
    first = torch.randn(1, 2, BLOCK, 4)
    layer.update(first, first)
    keys, _ = layer.update(torch.ones(1, 2, 300, 4), torch.ones(1, 2, 300, 4))
    assert torch.equal(keys[:, :, :BLOCK], first)
    address = layer._keys.data_ptr()
    layer.rollback(10)
    keys, _ = layer.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    assert layer._keys.data_ptr() == address == keys.data_ptr()
    assert keys.shape[2] == layer.get_seq_length() == 11


def test_the_cache_is_transformers_own_and_crops_like_it():
    cache = RollbackCache(MODELS["llama3.1"].config)
    MODELS["llama3.1"](torch.tensor([[1, 2, 3, 4]]), past_key_values=cache, use_cache=True)
    cache.crop(-2)
    assert cache.get_seq_length() == 2


def test_a_window_wider_than_the_models_own_is_refused():
    config = tiny.config("sliding")  # of 6 positions
    for window in (3, 6):
        assert RollbackCache(config, window).layers[0].window == window
    with pytest.raises(UserError, match="window: 8 is wider"):
        RollbackCache(config, 8)


def test_a_layer_that_cannot_be_rolled_back_is_refused():
    with pytest.raises(UserError, match="LinearAttentionAndFullAttentionLayer"):
        _rollback(LinearAttentionAndFullAttentionLayer(), None, BLOCK)
