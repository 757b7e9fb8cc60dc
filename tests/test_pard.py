"""A block of drafts from one pass: the formulas, and the target's own text."""

import pytest
import torch

from controllers import make_policy
from tests import tiny
from tts.acceptance import Coupled
from tts.drafting import make_drafter
from tts.drafting.pard import PardDrafter
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.models import ModelPair, load_pair
from tts.sampling import Warper
from tts.settings import Sampling

MASK = 63


def parallel(noise=0.03, vocab=64, layers=2, mask=MASK):
    target = tiny.model("llama3.1", vocab=vocab, layers=layers)
    draft = tiny.noisy(target, noise)
    draft.config.pard_token = mask
    return ModelPair(target, draft, tiny.tokenizer(vocab), "tiny-pard")


def test_the_config_says_what_a_draft_is():
    pair = parallel()
    assert type(make_drafter(pair.draft, 64)) is PardDrafter


@pytest.mark.parametrize("window", [None, 4])
def test_every_row_is_that_of_a_context_that_ends_in_masks(window):
    """Row j is the plain model's last row after the sequence and j masks, in a fresh cache."""
    pair, sequence, gamma = parallel(), [3, 17, 5, 40, 9, 21], 4
    drafter = make_drafter(pair.draft, 64, window)
    drafter.begin(lambda columns: Warper(Sampling(0.0, 0, 1.0, 0.0, 1.0), 0, columns))
    drafter.prefill(sequence[:4], None)
    seen = []
    warp = drafter._warp
    drafter._warp = lambda logits, *args: seen.append(logits) or warp(logits, *args)
    proposal = drafter.propose(sequence, gamma, 2, Coupled(0).draw, lambda signals: True)
    assert len(proposal.tokens) == gamma
    assert len(proposal.late) == 2
    rows = torch.cat([seen[0][-1:], *seen[1:]])
    for j in range(gamma):
        fed = sequence + [MASK] * j
        length = len(fed)
        query, key = torch.arange(length)[:, None], torch.arange(length)[None]
        seen_keys = (key <= query) & (key > query - (window or length))
        expected = pair.draft(torch.tensor([fed]), attention_mask=seen_keys[None, None]).logits
        torch.testing.assert_close(rows[j], expected[0, -1], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused():
    pair = parallel(mask=64)
    with pytest.raises(UserError, match="pard_token 64 is outside"):
        SpeculativeDecoder(pair, policy=make_policy("fixed")).session()


def test_a_published_folder_is_recognised(tmp_path):
    pair = parallel()
    target = tiny.save(pair.target, tmp_path / "target")
    draft = tiny.save(pair.draft, tmp_path / "draft")
    loaded = load_pair(str(target), str(draft), dtype="float32")
    assert type(make_drafter(loaded.draft, 64)) is PardDrafter
