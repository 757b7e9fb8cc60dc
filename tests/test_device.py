"""Nothing is left behind on the CPU when the models are on another device (see `tests.device`)."""

import pytest
import torch
from transformers import GenerationConfig

from controllers import make_policy
from tests import heads, tiny
from tests.device import DEVICE, SecondDevice
from tts import DistillConfig, Memory, PromptLookup, SpeculativeDecoder

PAIRS = {"autoregressive": tiny.pair, **heads.PAIRS}
OPTIONS = {
    "block": {"distill": DistillConfig(stride=8, window=16, max_update_share=1)},
    "coupled": {"memory": Memory(), "lookup": PromptLookup(shortest=3)},
}


def to(pair, device):
    for model in (pair.target, pair.draft):
        model.to(device)
        for name, value in vars(model).items():
            if isinstance(value, torch.Tensor):  # the draft's ids are no buffer
                setattr(model, name, value.to(device))
    return pair


def decoded(pair, ids, acceptance, options):
    decoder = SpeculativeDecoder(
        pair, policy=make_policy("fixed", gamma=3), acceptance=acceptance, **options
    )
    config = GenerationConfig(
        max_new_tokens=24, do_sample=True, temperature=0.8, top_p=0.95, top_k=0,
        repetition_penalty=1.1,
    )  # fmt: skip
    return decoder.generate(ids, generation_config=config, seed=1)


@pytest.fixture
def second_device():
    with SecondDevice():
        yield


@pytest.mark.parametrize("acceptance", OPTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_text_on_another_device(name, acceptance, second_device):
    options = OPTIONS[acceptance]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    here = decoded(PAIRS[name](), ids, acceptance, options)
    there = decoded(to(PAIRS[name](), DEVICE), ids.to(DEVICE), acceptance, options)
    assert there.sequences.device == DEVICE
    assert there.tokens == here.tokens
    if "distill" in options:
        assert any(record.update for record in there.rounds)


def test_the_second_device_does_not_mix(second_device):
    there = torch.ones(3, device=DEVICE)
    assert (there + 1).sum().item() == 6
    with pytest.raises(RuntimeError, match="one device"):
        there + torch.ones(3)
    with pytest.raises(TypeError, match="fetch it first"):
        there.numpy()
