"""The attention of few rows and the packed weights compute what PyTorch's own do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel

from tests import tiny
from tts import attention as attention_module
from tts.attention import MAX_SHORT_ROWS, SHORT, STEP, _by_halves, attention
from tts.cached_model import CachedModel
from tts.errors import UserError
from tts.lean import join_low_rank, separate
from tts.llama import straighten
from tts.packing import ROWS, PackedLinear, can_pack, pack

packs = pytest.mark.skipif(
    not can_pack("cpu", torch.bfloat16), reason="no FBGEMM on this CPU: nothing is packed"
)
exact_blocks = pytest.mark.skipif(
    packs.args[0]
    or torch.backends.cpu.get_cpu_capability() != "AVX512"
    or torch.cpu._is_amx_tile_supported(),
    reason="the order of sums was looked into on CPUs with AVX-512 and without AMX alone",
)


@pytest.mark.parametrize("rows", [1, 2, 5, MAX_SHORT_ROWS, MAX_SHORT_ROWS + 1])
@pytest.mark.parametrize("context", [33, 200])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_equals_a_masked_softmax(rows, context, heads, batch):
    torch.manual_seed(0)
    query_heads, key_heads = heads
    query = torch.randn(batch, query_heads, rows, 16)
    # views of a larger buffer, as the cache hands them out
    key = torch.randn(batch, key_heads, 300, 16)[:, :, :context]
    value = torch.randn(batch, key_heads, 300, 16)[:, :, :context]
    output, _ = attention(nn.Identity(), query, key, value, None, scaling=0.3)
    shared = query_heads // key_heads
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3) * 0.3
    future = torch.ones(rows, context, dtype=torch.bool).triu(context - rows + 1)
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    expected = (probs @ value.repeat_interleave(shared, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("context", [SHORT - 1, SHORT + 1, SHORT + STEP])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.inference_mode()
def test_attention_does_not_see_what_its_buffer_holds_behind_the_context(
    bidirectional, rows, context, batch, dtype
):
    torch.manual_seed(0)
    query = torch.randn(batch, 6, rows, 16, dtype=dtype)
    keys, values = torch.randn(2, batch, 2, SHORT + STEP + 1, 16, dtype=dtype)
    seen = [x[:, :, :context] for x in (keys, values)]
    before, _ = attention(nn.Identity(), query, *seen, None, bidirectional=bidirectional)
    for x in (keys, values):
        x[:, :, context:] = 1000.0
    after, _ = attention(nn.Identity(), query, *seen, None, bidirectional=bidirectional)
    alone = [x.clone() for x in seen]  # ends where it ends: not cut in halves
    expected, _ = attention(nn.Identity(), query, *alone, None, bidirectional=bidirectional)
    assert torch.equal(after, before)
    torch.testing.assert_close(after, expected)


def test_a_growing_context_brings_few_shapes_to_the_kernels(monkeypatch):
    shapes = set()

    def noting(query, key, *args):
        shapes.add((query.shape, key.shape))
        return _by_halves(query, key, *args)

    monkeypatch.setattr("tts.attention._by_halves", noting)
    keys = torch.randn(1, 2, SHORT + 4 * STEP, 16)
    with torch.inference_mode():
        for context in range(SHORT + STEP + 1, SHORT + 3 * STEP + 1):
            seen = keys[:, :, :context]
            attention(nn.Identity(), torch.randn(1, 6, 4, 16), seen, seen, None)
    # four rows, and one, two or three where a block lies across an edge
    assert len(shapes) == 2 + 3 + 3 + 3


def test_values_may_be_narrower_than_keys():
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 4)
    output, _ = attention(nn.Identity(), query, key, value, None)
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_attention_honours_a_given_mask_and_refuses_what_it_lacks():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8)
    mask = torch.rand(1, 1, 3, 6) > 0.4
    mask[..., 0] = True
    output, _ = attention(nn.Identity(), query, key, key, mask)
    expected = F.scaled_dot_product_attention(query, key, key, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    for name in ("softcap", "s_aux"):
        with pytest.raises(UserError, match=name):
            attention(nn.Identity(), query, key, key, None, **{name: torch.ones(2)})


HEADS = [(9, 3), (4, 4), (8, 1)]
FIRST = [5, 60, 500, SHORT - 20, SHORT + 600, 2 * SHORT - 8]


@exact_blocks
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_of_attention_is_the_same_in_every_block(heads, first, head_dim):
    torch.manual_seed(0)
    query_heads, key_heads = heads
    query = torch.randn(1, query_heads, MAX_SHORT_ROWS, head_dim).bfloat16()
    stored = torch.randn(2, 1, key_heads, 3 * SHORT, head_dim).bfloat16()

    def rows(start, end):
        keys, values = stored[:, :, :, : first + end]
        with torch.inference_mode():
            return attention(nn.Identity(), query[:, :, start:end], keys, values, None)[0]

    alone = torch.cat([rows(row, row + 1) for row in range(MAX_SHORT_ROWS)], 1)
    for size in (2, 3, 5, 9, 11, 12, 21, 22, 32):
        assert torch.equal(rows(0, size), alone[:, :size]), size
        assert torch.equal(rows(32 - size, 32), alone[:, -size:]), size


def test_halves_of_a_row_are_joined_alike_in_every_company():
    torch.manual_seed(0)
    said, log_mass = torch.randn(2, 3, 96, 8), 3 * torch.randn(2, 3, 96)
    whole = attention_module._joined(said, log_mass)
    alone = [
        attention_module._joined(said[:, :, row : row + 1], log_mass[:, :, row : row + 1])
        for row in range(96)
    ]
    assert torch.equal(whole, torch.cat(alone, 2))


@packs
@pytest.mark.parametrize("rows", [1, 2, 5, 9, ROWS, ROWS + 1])
def test_packed_products_are_the_products_and_a_row_is_the_same_in_every_block(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(576, 1536, bias=False), nn.Linear(1536, 96)).bfloat16()
    x = torch.randn(1, rows, 576).bfloat16()
    with torch.inference_mode():
        expected = model(x)
        pack(model)
        assert all(type(layer) is PackedLinear for layer in model)
        if rows > ROWS:
            assert torch.equal(model(x), expected)
        else:  # summed in another order: rarely, the last of eight bits differs
            torch.testing.assert_close(model(x), expected, rtol=2**-7, atol=2**-7)
            alone = [model(x[:, row : row + 1]) for row in range(rows)]
            assert torch.equal(model(x), torch.cat(alone, 1))


@packs
def test_usual_weights_keep_their_exact_value():
    torch.manual_seed(0)
    exponents = torch.arange(-17, 16).repeat(64, 1)
    weight = (torch.ldexp(1 + torch.rand(64, 33), exponents)).bfloat16().clamp(max=65000)
    layer = nn.Sequential(nn.Linear(33, 64, bias=False)).bfloat16()
    layer[0].weight.data = weight
    pack(layer)
    with torch.inference_mode():
        assert torch.equal(layer(torch.eye(33).bfloat16()[:ROWS]).T, weight[:, :ROWS])


@packs
def test_packing_again_takes_up_new_weights_and_float32_is_left_alone():
    layer = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    x = torch.randn(3, 64).bfloat16()
    pack(layer)
    with torch.inference_mode():
        before = layer(x)
        layer[0].weight.copy_(layer[0].weight * 2)
        assert torch.equal(layer(x), before)
        pack(layer)
        assert torch.equal(layer(x), before * 2)
    plain = nn.Sequential(nn.Linear(8, 8))
    pack(plain)
    assert type(plain[0]) is nn.Linear


def test_gradients_go_through_the_plain_weight():
    layer = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    pack(layer)
    layer(torch.randn(2, 64).bfloat16()).float().sum().backward()
    assert layer[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_the_straight_llama_is_bit_identical(dtype, window):
    stock = tiny.model("llama3.1").to(dtype)
    straight = tiny.model("llama3.1").to(dtype)
    for model in (stock, straight):
        model.set_attn_implementation("tts")
        pack(model)
    straighten(straight)
    assert straight.state_dict().keys() == stock.state_dict().keys()
    assert all("joint" in vars(layer.self_attn) for layer in straight.model.layers)
    assert straight.model.forward.__func__ is not LlamaModel.forward
    said = []
    for model in (stock, straight):
        cached = CachedModel(model, window, layers=(0, 1, 2))
        cached.feed([3, 17, 5, 40, 9])
        first = cached.feed([7, 8, 9], keep=3)
        cached.rollback(6)
        said.append((*first, *cached.feed([11], keep=1), *cached.feed([2, 30], keep=2)))
    for one, other in zip(*said, strict=True):
        assert torch.equal(one, other)


@packs
def test_what_an_adapter_adds_to_one_of_several_joined_layers_is_added_to_its_own_part():
    model = tiny.model("llama3.1").bfloat16()
    model.set_attn_implementation("tts")
    pack(model)
    straighten(model, torch.float32)
    layer = model.model.layers[0]

    def said():
        return CachedModel(model).feed([3, 17, 5], keep=3).hidden

    bare = said()
    torch.manual_seed(0)
    for linear in (layer.self_attn.k_proj, layer.mlp.up_proj):
        thin = torch.randn(linear.in_features, 2), torch.randn(2, linear.out_features)
        linear.low_rank = thin
    for module in (layer.self_attn, layer.mlp):
        join_low_rank(module)
    joined = said()
    assert (joined - bare).abs().max() > 0.1
    for module in (layer.self_attn, layer.mlp):
        separate(module)
    torch.testing.assert_close(joined, said(), rtol=2**-6, atol=2**-6)


def test_the_straight_llama_reads_embeddings():
    plain, straight = (tiny.model("llama3.1") for _ in range(2))
    straighten(straight)
    rows = torch.randn(1, 4, 32)
    assert torch.equal(straight(inputs_embeds=rows).logits, plain(inputs_embeds=rows).logits)


def test_the_straight_llama_leaves_the_rest_to_transformers():
    model = tiny.model("llama3.1")
    ids = torch.tensor([[3, 17, 5, 40]])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        model.set_attn_implementation("tts")
        straighten(model)
        for one, other in zip(
            model(ids, output_hidden_states=True).hidden_states, expected, strict=True
        ):
            torch.testing.assert_close(one, other)
    model.requires_grad_(True)
    model(ids).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_padding_is_not_seen():
    model = tiny.model("llama3.1")
    alone = model(torch.tensor([[5, 6, 7]])).logits[0]
    padded = model(
        torch.tensor([[9, 9, 5, 6, 7]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 0, 1, 2]]),
    ).logits[0, 2:]  # fmt: skip
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)
