"""The packaged SmolLM2-135M with the draft that ships, on real text."""

import importlib.metadata

import pytest
import torch
from transformers import GenerationConfig

from controllers import make_policy
from experiments.decode import decode
from experiments.options import TextOptions
from experiments.workload import FOLDER, PathFile
from tests.test_kernels import exact_blocks
from tts import DistillConfig, Memory, PromptLookup, SpeculativeDecoder, load_pair
from tts.cached_model import CachedModel
from tts.drafting.eagle3_model import Eagle3
from tts.fingerprint import model_fingerprint
from tts.models import PACKAGED

DRAFTS = PACKAGED["smollm2-135m"].drafts
try:
    importlib.metadata.distribution(PACKAGED["smollm2-135m"].distribution)
    MISSING = not all((folder / "model.safetensors").is_file() for folder in DRAFTS.values())
except importlib.metadata.PackageNotFoundError:
    MISSING = True
pytestmark = pytest.mark.skipif(MISSING, reason="the packaged model or a draft is not installed")

PROMPTS = [
    "Write a short story about a fox that lives in a lighthouse.",
    "Explain why the sky is blue, in two paragraphs.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "A shop sells pens at 3 dollars and books at 7. Ann pays 41 dollars for 7 things. How many?",
    "Give me a list of eight things to pack for a week in the mountains.",
    "Write a letter to a landlord about a broken heater.",
]


@pytest.fixture(scope="module")
def pair():
    return load_pair("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def half():
    return load_pair("smollm2-135m", dtype="bfloat16")


def ids(pair, prompt):
    turns = [{"role": "user", "content": prompt}]
    encoded = pair.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    return torch.tensor([encoded])


def greedy_differences(pair, prompt, gamma, new):
    """(tokens compared, ties): differences from the target alone where its top two are tied.

    After a tie the comparison goes on from the target's token.
    """
    decoder = SpeculativeDecoder(pair, policy=make_policy("fixed", gamma=gamma))
    config = GenerationConfig(max_new_tokens=new, do_sample=False)
    expected = pair.target.generate(prompt, generation_config=config)
    start, ties = prompt.shape[1], 0
    while start < expected.shape[1]:
        config = GenerationConfig(max_new_tokens=expected.shape[1] - start, do_sample=False)
        got = decoder.generate(expected[:, :start], generation_config=config).sequences
        differ = (got != expected[:, : got.shape[1]]).nonzero()
        if not len(differ):
            break
        start = int(differ[0, 1]) + 1
        top = pair.target(expected[:, : start - 1]).logits[0, -1].topk(2).values
        assert top[0] - top[1] < 1e-3, f"token {start} differs and is no tie"
        ties += 1
    return expected.shape[1] - prompt.shape[1], ties


def test_greedy_text_is_the_targets_own(pair):
    tokens, ties = greedy_differences(pair, ids(pair, PROMPTS[0]), 4, 48)
    assert tokens == 48
    assert ties == 0


@pytest.mark.slow
def test_greedy_text_is_the_targets_own_on_six_prompts(pair):
    compared = tied = 0
    for prompt in PROMPTS:
        for gamma in (0, 1, 4, 8):
            tokens, ties = greedy_differences(pair, ids(pair, prompt), gamma, 256)
            compared += tokens
            tied += ties
    assert tied <= compared / 10_000 + 1


def test_coupled_text_does_not_depend_on_gamma_nor_the_draft_and_overlap_not_on_gamma(pair):
    config = GenerationConfig(
        max_new_tokens=32, do_sample=True, temperature=0.8, top_p=0.95, top_k=0
    )
    # whose rows are functions of the tokens alone: a head's are of its own states, too
    plain = load_pair("smollm2-135m", "autoregressive", dtype="float32")
    texts, overlaps = set(), []
    for made, gamma in ((plain, 0), (plain, 1), (plain, 4), (pair, 1), (pair, 4)):
        decoder = SpeculativeDecoder(
            made, policy=make_policy("fixed", gamma=gamma), acceptance="coupled"
        )
        result = decoder.generate(ids(made, PROMPTS[1]), generation_config=config, seed=1)
        texts.add(tuple(result.tokens))
        if made is plain:
            overlaps.append(result.summary().mean_overlap)
    assert len(texts) == 1
    assert overlaps == pytest.approx([overlaps[0]] * 3, abs=1e-3)


def bfloat16_texts(pair, prompt, new):
    """Of rounds of every kind: nothing drafted, fixed lengths, both learning beside copies."""
    config = GenerationConfig(
        max_new_tokens=new, do_sample=True, temperature=0.8, top_p=0.95, top_k=0
    )
    copies = {"lookup": PromptLookup()}
    arms: list[dict] = [{"policy": make_policy("fixed", gamma=gamma)} for gamma in (0, 1, 4, 8)]
    arms.append({"policy": make_policy("mlp"), "distill": DistillConfig()} | copies)
    arms.append({"policy": make_policy("heuristic")} | copies)
    arms.append({"policy": make_policy("mlp"), "memory": Memory()} | copies)
    decoders = [SpeculativeDecoder(pair, acceptance="coupled", **arm) for arm in arms]
    return [decoder.generate(prompt, generation_config=config, seed=3) for decoder in decoders]


@exact_blocks
def test_bfloat16_text_does_not_depend_on_what_is_drafted(half):
    results = bfloat16_texts(half, ids(half, PROMPTS[3]), 48)
    assert len({tuple(result.tokens) for result in results}) == 1
    assert {len(result.rounds) for result in results[:2]} != {48}


@exact_blocks
@pytest.mark.slow
def test_bfloat16_text_does_not_depend_on_what_is_drafted_on_six_prompts(half):
    for prompt in PROMPTS:
        results = bfloat16_texts(half, ids(half, prompt), 600)
        assert len({tuple(result.tokens) for result in results}) == 1


@exact_blocks
def test_bfloat16_logits_do_not_depend_on_the_block(half):
    tokens = half.tokenizer(" ".join(PROMPTS) * 7)["input_ids"][:560]
    model = CachedModel(half.target)
    model.feed(tokens[:500])
    alone = torch.cat([model.feed([token]).logits for token in tokens[500:]])
    for size in (2, 3, 5, 9, 12, 32):
        model.rollback(500)
        parts = [tokens[first : first + size] for first in range(500, 560, size)]
        assert torch.equal(torch.cat([model.feed(x, len(x)).logits for x in parts]), alone), size


@pytest.fixture(scope="module")
def alone(pair):
    """64 tokens of the target's own, greedy, after the last prompt."""
    config = GenerationConfig(max_new_tokens=64, do_sample=False)
    return pair.target.generate(ids(pair, PROMPTS[5]), generation_config=config)


@pytest.mark.parametrize(
    ("name", "least"), [("autoregressive", 1.5), ("eagle3", 1.5), ("dflash", 1.1)]
)
def test_every_shipped_draft_is_accepted_and_writes_the_targets_text(alone, name, least):
    made = load_pair("smollm2-135m", name, dtype="float32")
    decoder = SpeculativeDecoder(made, policy=make_policy("fixed", gamma=4))
    config = GenerationConfig(max_new_tokens=64, do_sample=False)
    result = decoder.generate(ids(made, PROMPTS[5]), generation_config=config)
    assert result.sequences.equal(alone)
    assert result.summary().mean_acceptance_length > least


def test_the_draft_that_is_taken_unless_another_is_named(pair):
    assert isinstance(pair.draft, Eagle3)
    # the head that ships is refused for any other
    make_policy("specdecpp", draft=model_fingerprint(pair.draft_model))


def test_a_memory_helps_the_shipped_draft_where_text_comes_back(half):
    path = PathFile.read(str(FOLDER / "paths" / "tune.json")).dialogues[3]
    means = {}
    for memory in (None, Memory()):
        decoder = SpeculativeDecoder(
            half, policy=make_policy("fixed", gamma=0), acceptance="coupled", memory=memory
        )
        done = decode(decoder, path, TextOptions(max_new_tokens=128))
        values = [x for record in done.rounds for x in record.overlap]
        means[memory is None] = sum(values) / len(values)
    assert means[False] > 1.02 * means[True]


def test_the_shipped_drafts_are_small():
    sizes = {
        name: sum(file.stat().st_size for file in folder.iterdir())
        for name, folder in DRAFTS.items()
    }
    assert sizes["autoregressive"] <= 16 * 2**20
    assert max(sizes.values()) <= 20 * 2**20
    assert sum(sizes.values()) <= 48 * 2**20
