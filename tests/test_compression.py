"""INT8 and NF4 targets: the same engine, their own text, refusals in one sentence."""

import importlib.util
import json

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import GenerationConfig

from controllers import make_policy
from experiments.cli import main
from tests import tiny
from tts import SpeculativeDecoder, UserError, load_pair
from tts.cached_model import CachedModel
from tts.packing import PackedLinear

TOKENS = [3, 17, 5, 9, 30, 2, 8, 41, 6]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        # the CPU kernel of NF4 wants widths of 64 and heights of 32
        patch.setitem(tiny.COMMON, "hidden_size", 64)
        patch.setitem(tiny.COMMON, "head_dim", 16)
        target = tiny.model("llama3.1")
    return tiny.save_pair(target, 0.05, root)


def load(folders, compression, **kwargs):
    return load_pair(
        str(folders / "target"), str(folders / "draft"), compression=compression, **kwargs
    )


@pytest.mark.parametrize("compression", ["int8", "nf4"])
def test_the_body_is_compressed_and_the_head_is_not(folders, compression):
    pair = load(folders, compression)
    layer = pair.target.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    assert layer.self_attn.q_proj.weight.element_size() == 1
    assert pair.target.lm_head.weight.dtype == torch.bfloat16
    assert pair.target.get_input_embeddings().weight.dtype == torch.bfloat16
    assert pair.compression == compression
    assert isinstance(pair.target.lm_head, PackedLinear) or torch.cuda.is_available()
    assert pair.draft.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("compression", ["int8", "nf4"])
def test_the_quick_way_through_a_compressed_llama_changes_no_logit(folders, compression):
    quick, stock = (load(folders, compression, stock=stock).target for stock in (False, True))
    stock.set_attn_implementation("tts")  # the same attention: only the detours differ
    rows = [CachedModel(model).feed(TOKENS, keep=len(TOKENS)).logits for model in (quick, stock)]
    torch.testing.assert_close(*rows, atol=0.0, rtol=0.0)


def test_rejected_tokens_do_not_reach_the_rows_before_them_in_int8(folders):
    target = load(folders, "int8").target
    rows = []
    for tail in ([6, 6, 6], [63, 1, 44]):
        fed = CachedModel(target).feed([*TOKENS, *tail], keep=len(TOKENS) + 3)
        rows.append(fed.logits[: len(TOKENS)])
    assert torch.equal(*rows)


@pytest.mark.parametrize("compression", ["int8", "nf4"])
def test_a_path_of_a_compressed_target_is_its_own(folders, compression):
    pair = load(folders, compression)
    config = GenerationConfig(max_new_tokens=40, do_sample=True, temperature=0.8, top_k=0)

    def generate(gamma, **kwargs):
        policy = make_policy("fixed", gamma=gamma)
        decoder = SpeculativeDecoder(pair, policy=policy, acceptance="coupled")
        return decoder.generate(torch.tensor([[3, 4]]), generation_config=config, **kwargs)

    path = generate(0).tokens
    again = generate(0, path=path).summary()
    assert (again.path_mismatches, again.path_mismatch_rate) == (0, 0.0)
    forced = generate(4, path=path)
    assert forced.tokens == path
    assert forced.summary().num_accepted_draft_tokens > 0


def test_an_unknown_compression_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"compression: 'int4' is not one of none, int8, nf4"):
        load_pair(compression="int4")


@pytest.mark.parametrize("name", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(monkeypatch, name):
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else honest(n))
    with pytest.raises(UserError, match=f"compression: nf4 needs {name}: run pip install"):
        load_pair(compression="nf4")


@pytest.mark.parametrize(
    ("stored", "compression", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "none", "of the mixed form"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4", "quantized already"),
    ],
)
def test_quantized_checkpoints_that_cannot_verify_are_refused(
    folders, tmp_path, stored, compression, message
):
    config = json.loads((folders / "target" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(UserError, match=message):
        load_pair(str(tmp_path), str(folders / "draft"), compression=compression)


def test_compression_is_recorded_and_a_path_keeps_to_its_own(folders, tmp_path, capsys):
    models = [f"--target={folders / 'target'}", f"--draft={folders / 'draft'}"]
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps({"turns": ["abc", "d"]}))
    text = [f"--workload={talk}", "--max-new-tokens=20", "--turn-tokens=10"]
    path = tmp_path / "path.json"
    assert main(["record", *models, *text, "--compression=int8", f"--out={path}"]) == 0
    run = ["run", *models, *text, f"--path={path}", "--arms=[static,gamma]", "--wandb=disabled",
           f"--results={tmp_path}"]  # fmt: skip
    assert main([*run, "--compression=int8", "--run-id=a"]) == 0
    rows = (tmp_path / "run" / "a" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["compression"] for row in rows} == {"int8"}
    summary = json.loads((tmp_path / "run" / "a" / "summary.json").read_text())
    assert summary["compression"] == "int8"
    assert summary["arms"]["static"]["path_mismatch_rate"] is not None
    assert main(run) == 2
    assert "compression: none is not the int8 that the path" in capsys.readouterr().err
    assert main([*run, "--compression=int4"]) == 2


def test_layers_that_the_cpu_kernel_of_nf4_cannot_run_are_refused(tmp_path):
    target = tiny.model("llama3.1")
    tiny.save(target, tmp_path / "target")
    tiny.save(target, tmp_path / "draft")
    if not has_avx512bf16():
        pytest.skip("this CPU's NF4 has no such kernel")
    with pytest.raises(UserError, match="multiples of 64 x 32, model"):
        load_pair(str(tmp_path / "target"), str(tmp_path / "draft"), compression="nf4")
