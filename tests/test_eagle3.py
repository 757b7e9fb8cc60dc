"""EAGLE-3: the formulas and the published layouts."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.heads import LAYERS, Recorded, eagle3_pair, features_of
from tts.drafting import eagle3_checkpoint, make_drafter
from tts.drafting.eagle3 import Eagle3Drafter
from tts.drafting.eagle3_model import Eagle3
from tts.errors import UserError
from tts.models import load_pair

VARIANTS = [
    {},
    {"norm_before_residual": True},
    {"norm_output": True, "fc_norm": True},
    {"norm_before_fc": True, "qk_norm": True},
    {"num_hidden_layers": 2},
]


def formula(model, tokens, features, hidden=None, keys=None, first=0):
    """The head by the formulas, in float64, one pair after the other: (h of each, keys).

    Args:
        tokens, features: of the pairs; ``hidden`` stands in for the fused features.
        keys: list of (key, value) by layer of the pairs before.
    """
    c = model.config
    w = {k: v.double() for k, v in model.state_dict().items()}
    heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()

    def turn(x, position):
        angle = position * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
        angle = torch.cat([angle, angle])
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    keys = [list(layer) for layer in keys or [[] for _ in range(c.num_hidden_layers)]]
    said = []
    for row, token in enumerate(tokens):
        if hidden is None:
            f = features[row].double()
            if c.fc_norm:
                parts = f.split(c.target_hidden_size)
                f = torch.cat([norm(x, w[f"fc_norm.{i}.weight"]) for i, x in enumerate(parts)])
            if c.norm_before_fc:
                f = norm(f, w["input_norm.weight"])
            h = w["fc.weight"] @ f
        else:
            h = hidden
        embedding = w["embed_tokens.weight"][token]
        for i in range(c.num_hidden_layers):
            p = f"layers.{i}."
            if i == 0:
                normed = norm(h, w[p + "hidden_norm.weight"])
                x = torch.cat([norm(embedding, w[p + "input_layernorm.weight"]), normed])
                h = normed if c.norm_before_residual else h
            else:
                x = norm(h, w[p + "input_layernorm.weight"])
            q, k, v = (w[p + f"self_attn.{n}_proj.weight"] @ x for n in "qkv")
            q, k, v = q.view(heads, dim), k.view(kv, dim), v.view(kv, dim)
            if c.qk_norm:
                q = norm(q, w[p + "self_attn.q_norm.weight"])
                k = norm(k, w[p + "self_attn.k_norm.weight"])
            keys[i].append((turn(k, first + row), v))
            q = turn(q, first + row)
            mixed = []
            for one in range(heads):
                mine = one // (heads // kv)
                scores = torch.stack([q[one] @ key[mine] for key, _ in keys[i]]) / dim**0.5
                values = torch.stack([value[mine] for _, value in keys[i]])
                mixed.append(scores.softmax(0) @ values)
            h = h + w[p + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            x = norm(h, w[p + "post_attention_layernorm.weight"])
            gate, up, down = (w[p + f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            h = h + down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
        said.append(h)
    return said, keys


def logits_of(model, h):
    weight = model.norm.weight.double()
    normed = weight * h / (h.square().mean() + model.config.rms_norm_eps).sqrt()
    return model.lm_head.weight.double() @ normed


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chain_is_what_the_formulas_say(variant):
    made = eagle3_pair(**variant)
    sequence = [3, 17, 5, 40, 9, 21, 33]
    features = features_of(made.target, sequence)
    drafter = make_drafter(made.draft, 64)
    assert type(drafter) is Eagle3Drafter
    rows = Recorded(drafter)
    drafter.prefill(sequence[:5], features[:4])
    drafter.commit(len(sequence), features[4:6])
    proposal = rows.propose(sequence, 4, pending=2)
    said, keys = formula(made.draft, sequence[1:], features[:6])
    expected = [logits_of(made.draft, h) for h in said[-3:]]
    h = said[-1]
    for i, token in enumerate(proposal.tokens[:-1]):
        if made.draft.config.norm_output:
            weight = made.draft.norm.weight.double()
            h = weight * h / (h.square().mean() + made.draft.config.rms_norm_eps).sqrt()
        (h,), keys = formula(made.draft, [token], None, h, keys, 6 + i)
        expected.append(logits_of(made.draft, h))
    torch.testing.assert_close(
        torch.cat(rows.logits).double(), torch.stack(expected), atol=1e-4, rtol=1e-4
    )


# --- checkpoints -------------------------------------------------------------------------------


@pytest.fixture
def target_folder(tmp_path):
    return tiny.save(tiny.model("llama3.1"), tmp_path / "target")


def official(made, folder, pickled=False, **changes):
    """A folder as the authors publish it: ``midlayer``, offsets, no embedding."""
    folder.mkdir(exist_ok=True)
    c = made.draft.config
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 32,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_hidden_layers": 1, "rms_norm_eps": c.rms_norm_eps, "vocab_size": 64,
        "draft_vocab_size": c.draft_vocab_size, "max_position_embeddings": 512,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 0, 1]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = {
        name.replace("layers.0", "midlayer"): value.contiguous()
        for name, value in made.draft.state_dict().items()
        if name not in ("embed_tokens.weight", "draft_ids")
    }
    ids = made.draft.draft_ids
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros(64, dtype=torch.bool).index_fill(0, ids, True)
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder, tensors


@pytest.mark.parametrize("pickled", [False, True])
def test_the_authors_layout_loads(target_folder, tmp_path, pickled):
    made = eagle3_pair(ids=torch.arange(3, 50))
    folder, _ = official(made, tmp_path / "draft", pickled)
    loaded = load_pair(str(target_folder), str(folder), dtype="float32")
    assert type(loaded.draft) is Eagle3
    assert loaded.draft.config.target_layers == (2, 1, 2)  # outputs 1, 0, 1
    for name, value in made.draft.state_dict().items():
        assert torch.equal(value, loaded.draft.state_dict()[name]), name


def test_the_default_layers_are_those_of_the_authors():
    assert eagle3_checkpoint.read_layers(32) == (2, 16, 29)
    assert eagle3_checkpoint.read_layers(36) == (2, 18, 33)


def test_what_is_saved_is_the_layout_of_speculators_and_loads_unchanged(target_folder, tmp_path):
    target = tiny.model("llama3.1")
    made = eagle3_checkpoint.from_target(target, torch.arange(3, 50), LAYERS, (0, 1), "")
    eagle3_checkpoint.save(made.bfloat16(), tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == list(LAYERS)
    loaded = load_pair(str(target_folder), str(tmp_path / "draft"))
    assert loaded.draft.config.target_layers == LAYERS
    for name, value in made.state_dict().items():
        assert torch.equal(value, loaded.draft.state_dict()[name]), name


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("missing", r"lacks the tensors \['fc.weight'\]"),
        ("extra", "'surplus'"),
        ("shape", "norm.weight"),
        ("width", "states 48 wide"),
        ("vocabulary", "over 65 ids"),
        ("layer", "hidden states"),
        ("d2t", "d2t"),
        ("field", "hidden_size"),
        ("sliding", "sliding_attention"),
        ("tokens", "use_aux_hidden_state: false"),
        ("unnamed", "lacks d2t"),
        ("none", "neither"),
    ],
)
def test_bad_folders_are_refused_in_one_sentence(target_folder, tmp_path, damage, says):
    made = eagle3_pair(ids=torch.arange(3, 50))
    changes = {
        "width": {"target_hidden_size": 48}, "vocabulary": {"vocab_size": 65},
        "layer": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}},
        "field": {"hidden_size": None},
        "sliding": {"layer_types": ["sliding_attention"], "sliding_window": 8},
        "tokens": {"eagle_config": {"use_aux_hidden_state": False}},
    }.get(damage, {})  # fmt: skip
    folder, tensors = official(made, tmp_path / "draft", **changes)
    if damage == "missing":
        del tensors["fc.weight"]
    if damage == "extra":
        tensors["surplus"] = torch.zeros(1)
    if damage == "shape":
        tensors["norm.weight"] = torch.zeros(31)
    if damage == "unnamed":
        del tensors["d2t"]
    if damage == "d2t":
        tensors["d2t"] = tensors["d2t"] + 60
    save_file(tensors, folder / "model.safetensors")
    if damage == "none":
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=says):
        load_pair(str(target_folder), str(folder), dtype="float32")


def test_a_pickle_with_code_in_it_is_not_opened(target_folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("executed",))

    folder, _ = official(eagle3_pair(), tmp_path / "draft")
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        load_pair(str(target_folder), str(folder))


def test_a_long_prompt_in_pieces_is_read_alike(monkeypatch):
    made, said = eagle3_pair(num_hidden_layers=2), []
    sequence = [3, 17, 5, 40, 9, 21, 33, 8, 60, 2]
    features = features_of(made.target, sequence)
    for chunk in (512, 3):
        monkeypatch.setattr("tts.drafting.eagle3.CHUNK", chunk)
        drafter = make_drafter(made.draft, 64, 4)
        rows = Recorded(drafter)
        drafter.prefill(sequence, features[:-1])
        rows.propose(sequence, 2)
        said.append(torch.cat(rows.logits))
    torch.testing.assert_close(*said, atol=1e-4, rtol=1e-4)
