"""DFlash: the formulas, transformers' own DFlash generation, and the published layouts."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, GenerationConfig

from experiments.options import ModelOptions
from experiments.peers import peers, transformers_dflash
from tests import tiny
from tests.heads import LAYERS, Recorded, dflash, dflash_pair, features_of
from tests.test_engine import decode, greedy
from tts.drafting import dflash_checkpoint, dflash_start, make_drafter
from tts.drafting.chain import ChainDrafter
from tts.drafting.dflash import DFlashDrafter
from tts.drafting.dflash_model import DFlash
from tts.errors import UserError
from tts.models import ModelPair, load_pair

SEQUENCE = [3, 17, 5, 40, 9, 21, 33]


def formula(model, tokens, features):
    """Logits of the block after ``tokens`` by the formulas, in float64, head by head."""
    c = model.config
    w = {k: v.double() for k, v in model.state_dict().items()}
    kv, dim, size = c.num_key_value_heads, c.head_dim, c.block_size

    def norm(x, name):
        return w[name] * x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()

    def turn(x, positions):
        angle = positions[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
        angle = torch.cat([angle, angle], -1)
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    anchor = len(tokens) - 1
    context = norm(features[:anchor].double() @ w["fc.weight"].T, "hidden_norm.weight")
    x = w["embed_tokens.weight"][[tokens[-1], *[c.mask_token_id] * (size - 1)]]
    before, block = torch.arange(anchor), torch.arange(anchor, anchor + size)
    for i in range(c.num_hidden_layers):
        p = f"layers.{i}."
        a = p + "self_attn."
        n = norm(x, p + "input_layernorm.weight")
        rows, places = torch.cat([context, n]), torch.cat([before, block])
        mixed = []
        for one in range(c.num_attention_heads):
            mine, own = one // (c.num_attention_heads // kv), slice(one * dim, (one + 1) * dim)
            shared = slice(mine * dim, (mine + 1) * dim)
            q = turn(norm(n @ w[a + "q_proj.weight"][own].T, a + "q_norm.weight"), block)
            k = turn(norm(rows @ w[a + "k_proj.weight"][shared].T, a + "k_norm.weight"), places)
            v = rows @ w[a + "v_proj.weight"][shared].T
            mixed.append((q @ k.T / dim**0.5).softmax(-1) @ v)
        x = x + torch.cat(mixed, -1) @ w[a + "o_proj.weight"].T
        n = norm(x, p + "post_attention_layernorm.weight")
        gate, up, down = (w[p + f"mlp.{m}_proj.weight"] for m in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(n @ gate.T) * (n @ up.T)) @ down.T
    return norm(x, "norm.weight")[1:] @ w["lm_head.weight"].T


def test_a_block_is_what_the_formulas_say():
    made = dflash_pair()
    features = features_of(made.target, SEQUENCE)
    drafter = make_drafter(made.draft, 64)
    assert type(drafter) is DFlashDrafter
    rows = Recorded(drafter)
    drafter.prefill(SEQUENCE[:5], features[:4])
    drafter.commit(len(SEQUENCE), features[4:6])
    proposal = rows.propose(SEQUENCE, gamma=9, pending=2)
    assert len(proposal.tokens) == 4  # a block of five less its anchor
    late = [formula(made.draft, SEQUENCE[:end], features)[:1] for end in (5, 6)]
    expected = torch.cat([*late, formula(made.draft, SEQUENCE, features)])
    torch.testing.assert_close(torch.cat(rows.logits).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_blocks_of_one_pass_are_those_of_passes_of_their_own(window):
    made = dflash_pair()
    sequence = torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(2)).tolist()
    features = features_of(made.target, sequence)
    rows, passes = [], []
    made.draft.register_forward_hook(lambda *_: passes.append(len(rows)))
    for step in (19, 1):  # more blocks than one pass takes; one a pass
        drafter = make_drafter(made.draft, 64, window)
        assert isinstance(drafter, DFlashDrafter)
        seen = Recorded(drafter)
        drafter.prefill(sequence[:5], features[:4])
        for end in range(5 + step, 25, step):
            drafter.commit(end, features[end - step - 1 : end - 1])
            drafter.catch_up(sequence[:end], step)
        rows.append(torch.cat(seen.logits))
    torch.testing.assert_close(*rows, atol=1e-4, rtol=1e-4)
    assert [passes.count(0), passes.count(1)] == [4, 19]  # six blocks of five rows are the most


@pytest.mark.parametrize("prompt", [[3, 17, 5, 40, 9], [61, 2], [8, 30, 8, 30, 8, 30]])
def test_transformers_own_dflash_drafts_the_same_tokens(prompt):
    target = tiny.model("llama3.1")
    ours = dflash(target, target_layers=(1, 2))
    peer = transformers_dflash(ours)
    if peer is None:
        pytest.skip("this transformers has no DFlash")
    drafted = []
    honest = peer.forward

    def watched(**kwargs):
        output = honest(**kwargs)
        drafted.append(target.lm_head(output.last_hidden_state[0, 1:]).argmax(-1).tolist())
        return output

    peer.forward = watched
    config = GenerationConfig(max_new_tokens=40, do_sample=False, speculation_type="dflash")
    theirs = target.generate(torch.tensor([prompt]), generation_config=config, assistant_model=peer)
    made = ModelPair(target, ours, tiny.tokenizer(), "tiny-dflash")
    proposals = []
    original = ChainDrafter.propose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ChainDrafter, "propose",
            lambda self, *args: proposals.append(original(self, *args)) or proposals[-1],
        )  # fmt: skip
        result = decode(made, 4, greedy(40), prompt=torch.tensor([prompt]))
    assert result.sequences.tolist() == theirs.tolist()
    # transformers begins with a token of the target's own, without drafts
    mine = {tuple(p.tokens) for p in proposals if len(p.tokens) == 4}
    shared = [tuple(block) for block in drafted if tuple(block) in mine]
    assert len(shared) >= len(drafted) - 3


class Tokens:
    """A streamer that keeps all it is given."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


# --- checkpoints -------------------------------------------------------------------------------


@pytest.fixture
def target_folder(tmp_path):
    return tiny.save(tiny.model("llama3.1"), tmp_path / "target")


def z_lab(model, folder, inside=False, **changes):
    """A folder as z-lab publishes it: no embedding, no head; ids count layer outputs."""
    folder.mkdir()
    config = {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": 32,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "num_target_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_hidden_layers": 2, "rms_norm_eps": model.config.rms_norm_eps, "vocab_size": 64,
        "rope_theta": 10000, "layer_types": ["full_attention"] * 2, "block_size": 5,
        "dflash_config": {"mask_token_id": 62, "target_layer_ids": [-1, 0, 1]},
    }  # fmt: skip
    if inside:
        config["dflash_config"]["block_size"] = config.pop("block_size")
    for key, value in changes.items():
        (config if key in config else config["dflash_config"])[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if name not in ("embed_tokens.weight", "lm_head.weight", "draft_ids")
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_bench_has_transformers_own_generation_for_the_draft(target_folder, tmp_path):
    target = tiny.model("llama3.1")
    dflash_checkpoint.save(dflash(target, target_layers=(1, 2)), tmp_path / "draft")
    config = ModelOptions(str(target_folder), "float32", draft=str(tmp_path / "draft"))
    arms = peers(config, target, lengths=(1,))
    assert list(arms) == [
        f"transformers, {name}"
        for name in ("plain", "plain, our kernels", "prompt lookup", "DFlash")
    ]
    said = {}
    for name, arm in arms.items():
        streamer = Tokens()
        arm(torch.tensor([SEQUENCE]), greedy(20), 0, streamer)
        said[name] = streamer.tokens
    assert len(set(map(tuple, said.values()))) == 1
    assert len(said["transformers, DFlash"]) == len(SEQUENCE) + 20


@pytest.mark.parametrize("inside", [False, True])
def test_z_labs_layout_loads(target_folder, tmp_path, inside):
    model = dflash(tiny.model("llama3.1"))
    z_lab(model, tmp_path / "draft", inside)
    loaded = load_pair(str(target_folder), str(tmp_path / "draft"), dtype="float32").draft
    assert type(loaded) is DFlash
    assert loaded.config.target_layers == LAYERS  # outputs -1 (the embedding), 0 and 1
    assert loaded.config.block_size == 5
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_the_default_layers_are_those_of_the_authors():
    minus = lambda layers: [i - 1 for i in layers]  # noqa: E731
    assert minus(dflash_checkpoint.read_layers(5, 36)) == [1, 9, 17, 25, 33]
    assert minus(dflash_checkpoint.read_layers(5, 30)) == [1, 8, 14, 20, 27]
    assert minus(dflash_checkpoint.read_layers(1, 30)) == [15]
    assert dflash_checkpoint.read_layers(3, 30) == (2, 15, 28)  # what the shipped head reads


def test_what_is_saved_is_the_layout_of_speculators_and_loads_unchanged(target_folder, tmp_path):
    target = tiny.model("llama3.1").bfloat16()
    made = dflash_start.from_target(target, torch.arange(3, 50), LAYERS, (0, 1), 5, 62, "", 48)
    dflash_checkpoint.save(made, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["aux_hidden_state_layer_ids"] == list(LAYERS)
    assert config["transformer_layer_config"]["intermediate_size"] == 48
    loaded = load_pair(str(target_folder), str(tmp_path / "draft")).draft
    for name, value in loaded.state_dict().items():
        *module, leaf = name.rsplit(".", 1)
        own = getattr(made.get_submodule(*module) if module else made, leaf)
        assert torch.equal(own.to(value.dtype), value), name


@torch.no_grad()
def test_a_new_drafters_masks_hold_their_anchors_embedding_and_its_features_are_white():
    target = tiny.model("llama3.1")
    # what a look-up goes by: a direction that embeddings share
    target.get_input_embeddings().weight.add_(2.0).mul_(0.3)
    made = dflash_start.from_target(target, torch.arange(3, 60), LAYERS, (0, 1), 5, 62, "")
    seen = {}
    first = made.layers[0].self_attn
    first.register_forward_hook(lambda module, inputs, output: seen.update(taken=output[0]))
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    states = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    read = torch.cat([states[layer] for layer in LAYERS], -1)
    anchors = torch.arange(20, 40)[None]
    made.unroll(ids[:, 20:], anchors, read, DynamicCache())
    masks = seen["taken"].view(20, 5, -1)[:, 1:] + made.embed_tokens.weight[62]
    alike = torch.cosine_similarity(masks, made.embed_tokens(ids[0, 20:])[:, None], -1)
    assert alike.mean() > 0.9
    rows = torch.cat([dflash_start.sample(target)[layer] for layer in LAYERS], -1)
    white = rows @ made.fc.parametrizations.weight[0].whiten
    spread = white.T @ white / len(white)
    assert (spread.diagonal() <= 1.01).all()
    assert (spread.diagonal() > 0.9).float().mean() > 0.5


@torch.no_grad()
def test_the_neurons_that_write_nothing_are_left_out_first():
    target = tiny.model("llama3.1")
    target.model.layers[1].mlp.down_proj.weight[:, ::2] *= 1e-6
    made = dflash_start.from_target(target, torch.arange(3, 60), LAYERS, (0, 1), 5, 62, "", 32)
    x = torch.randn(10, 32)
    expected = target.model.layers[1].mlp(x)
    torch.testing.assert_close(made.layers[1].mlp(x), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 48}, "states 48 wide"),
        ({"vocab_size": 65}, "over 65 ids"),
        ({"target_layer_ids": [0, 7]}, "hidden states"),
        ({"mask_token_id": 64}, "mask_token_id 64"),
        ({"block_size": 1}, "block_size 1"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"is_causal": True}, "is_causal"),
        ({"num_hidden_layers": 3}, "lacks the tensors"),
        ({"intermediate_size": 63}, "down_proj"),
    ],
)
def test_bad_folders_are_refused_in_one_sentence(target_folder, tmp_path, changes, says):
    z_lab(dflash(tiny.model("llama3.1")), tmp_path / "draft", **changes)
    with pytest.raises(UserError, match=says):
        load_pair(str(target_folder), str(tmp_path / "draft"), dtype="float32")


def test_a_long_prompt_in_pieces_is_read_alike(monkeypatch):
    monkeypatch.setattr("tts.drafting.dflash.CHUNK", 3)
    test_a_block_is_what_the_formulas_say()
