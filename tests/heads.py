"""Random drafters that read a tiny target's features, and a look at what they say."""

import numpy as np
import torch

from tests import tiny
from tts.drafting.dflash_model import DFlash, DFlashConfig
from tts.drafting.eagle3_model import Eagle3, Eagle3Config
from tts.models import ModelPair
from tts.sampling import Distribution

LAYERS = (0, 1, 2)


def eagle3(target, seed=0, ids=None, **variant):
    """A random head of one layer."""
    return _random(Eagle3, Eagle3Config, target, seed, ids, {"num_hidden_layers": 1} | variant)


def eagle3_pair(vocab=64, layers=2, **kwargs):
    target = tiny.model("llama3.1", vocab=vocab, layers=layers)
    return ModelPair(target, eagle3(target, **kwargs), tiny.tokenizer(vocab), "tiny-eagle3")


def dflash(target, seed=0, ids=None, **variant):
    """A random drafter of four tokens a block."""
    own = {"num_hidden_layers": 2, "block_size": 5, "mask_token_id": target.config.vocab_size - 2}
    return _random(DFlash, DFlashConfig, target, seed, ids, own | variant)


def dflash_pair(vocab=64, layers=2, **kwargs):
    target = tiny.model("llama3.1", vocab=vocab, layers=layers)
    return ModelPair(target, dflash(target, **kwargs), tiny.tokenizer(vocab), "tiny-dflash")


def pard_pair(vocab=64, layers=2, seed=0, ids=None, noise=0.4):
    """A plain draft that fills in masks, embedding and head as the target's."""
    target = tiny.model("llama3.1", vocab=vocab, layers=layers)
    draft = tiny.noisy(target, noise, seed + 1)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getattr(draft, name)().weight.copy_(getattr(target, name)().weight)
    draft.config.pard_token = vocab - 2
    return ModelPair(target, draft, tiny.tokenizer(vocab), "tiny-pard")


PAIRS = {"eagle3": eagle3_pair, "dflash": dflash_pair, "pard": pard_pair}


def _random(kind, config, target, seed, ids, own):
    """Weights whose distributions are neither flat nor point masses."""
    torch.manual_seed(seed)
    vocab = target.config.vocab_size
    ids = torch.arange(vocab) if ids is None else ids
    fields = {
        **tiny.COMMON, "vocab_size": vocab, "target_hidden_size": target.config.hidden_size,
        "target_layers": LAYERS, "draft_vocab_size": len(ids),
    }  # fmt: skip
    made = kind(config(**(fields | own)))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
        else:
            parameter.data.uniform_(0.5, 1.5)
    made.draft_ids = ids
    made.embed_tokens.weight.data.copy_(target.get_input_embeddings().weight)
    made.lm_head.weight.data.copy_(target.get_output_embeddings().weight[ids])
    return made.eval().requires_grad_(False)


def features_of(target, sequence):
    """`[positions, layers x hidden]`, read in one pass."""
    states = target(torch.tensor([sequence]), output_hidden_states=True).hidden_states
    return torch.cat([states[i][0] for i in LAYERS], -1)


class Recorded:
    """Keeps the raw rows that a drafter warps."""

    def __init__(self, drafter):
        self.drafter, self.logits = drafter, []
        drafter.begin(lambda columns: self)

    def __call__(self, logits, sequence, first):
        self.logits.append(logits)
        ids = np.arange(logits.shape[1])
        return [Distribution(ids, row) for row in logits.float().softmax(-1).detach().numpy()]

    def propose(self, sequence, gamma, pending=0):
        return self.drafter.propose(
            sequence, gamma, pending, lambda q, position: int(q.probs.argmax()), lambda said: True
        )
