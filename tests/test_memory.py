"""The memory of what the target said: its formula, what it may know when, and that it helps."""

import numpy as np
import pytest
import torch

from controllers import make_policy
from tests import tiny
from tests.heads import PAIRS
from tests.test_engine import PROMPT, decode, greedy, sampled
from tests.test_laws import ALPHA, VOCAB, Mixed, p_value
from tts import Memory, PromptLookup, SpeculativeDecoder
from tts.cached_model import Rows
from tts.drafting import make_drafter
from tts.drafting.memory import Recall
from tts.errors import UserError

IDS, HIDDEN = 12, 6
WIDE = Memory(neighbours=3, width=IDS, sharpness=4.0)
FAMILIES = {"autoregressive": tiny.pair, **PAIRS}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def states(count, seed=0):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def words(count, seed=1):
    return 3 * torch.randn(count, IDS, generator=torch.Generator().manual_seed(seed))


def lesson(count=8, memory=WIDE, columns=None):
    """A recall that knows positions 0 to ``count`` - 1."""
    recall = Recall(memory, columns, IDS)
    recall.see(states(count), 0)
    recall.hear(words(count), 0)
    return recall


def flat(states, columns=IDS):
    """Rows of a draft that knows nothing."""
    return Rows(states, torch.zeros(len(states), columns))


def test_a_row_is_the_mixture_of_the_formula():
    rows = Rows(states(1, seed=5), words(1, seed=6))
    mixed = lesson().recall(rows, 8).logits.softmax(-1)[0]
    keys, query = states(8) - states(8).mean(0), rows.hidden[0] - states(8).mean(0)
    likeness = (keys @ query) / (keys.norm(dim=1) * query.norm())
    expected = 0.01 * rows.logits[0].softmax(-1)
    for i in likeness.argsort(descending=True)[:3]:
        expected += torch.exp(4.0 * (likeness[i] - 1)) * words(8)[i].softmax(-1)
    torch.testing.assert_close(mixed, expected / expected.sum())


def test_states_are_compared_on_the_threads_of_the_pass():
    """Threads of NumPy's own go on spinning after a product and slow the target's next pass."""

    class NoArithmetic(np.ndarray):
        __array_ufunc__ = None

    recall, rows = lesson(), flat(states(2, seed=5))
    expected = recall.recall(rows, 8).logits
    recall._keys = recall._keys.view(NoArithmetic)
    assert torch.equal(recall.recall(rows, 8).logits, expected)


def check_a_row_knows_earlier_positions_alone():
    rows, changed = flat(states(8)), words(8)
    changed[5:] = words(3, seed=9)
    said = []
    for logits in (words(8), changed):
        recall = Recall(Memory(neighbours=8, width=IDS, sharpness=4.0), None, IDS)
        recall.hear(logits, 0)  # rounds without drafts: the draft's states come later, all at once
        said.append(recall.recall(rows, 0).logits)
    assert torch.equal(said[0][:6], said[1][:6])
    assert not torch.isclose(said[0][6:], said[1][6:]).all(1).any()
    assert torch.equal(said[0][0], rows.logits[0])  # nothing was before


def test_a_row_knows_earlier_positions_alone():
    check_a_row_knows_earlier_positions_alone()


def check_a_rejected_state_is_forgotten():
    recall, wrong, right = lesson(), states(1, seed=7), states(1, seed=8)
    recall.see(wrong, 9)  # drafted behind a token at 8 that is rejected
    recall.hear(words(1, seed=3), 8)
    recall.hear(4 * words(1, seed=4), 9)  # a round without drafts
    recall.see(right, 9)
    best = int(words(1, seed=4).argmax())
    for state, known in ((right, True), (wrong, False)):
        probs = recall.recall(flat(state), 10).logits.softmax(-1)[0]
        assert (probs[best] > 0.5) == known


def test_a_rejected_state_is_forgotten():
    check_a_rejected_state_is_forgotten()


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_the_oldest_positions_make_room(capacity):
    memory = Memory(capacity=capacity, neighbours=1, width=IDS, sharpness=50.0)
    recall = Recall(memory, None, IDS)
    recall.see(states(6), 0)
    recall.hear(8 * words(6), 0)  # more than there is room for
    recall.see(states(8)[6:], 6)
    recall.hear(8 * words(8)[6:], 6)
    assert sorted(recall._positions.tolist()) == list(range(8 - capacity, 8))
    newest = recall.recall(flat(states(8)[-1:]), 8).logits[0]
    assert newest.argmax() == words(8)[-1].argmax()


def test_ids_that_the_draft_lacks_are_not_raised():
    full = lesson().recall(flat(states(1, seed=5)), 8).logits
    narrow = lesson().recall(flat(states(1, seed=5), 8), 8).logits
    assert narrow.shape == (1, 8)
    few, all_ids = ((x.exp() - 1)[0] / x.shape[1] for x in (narrow, full))
    torch.testing.assert_close(few, all_ids[:8])


def test_ids_without_a_column_are_not_raised():
    columns = torch.tensor([0, 3, 4, 7, 11])
    raised = lesson(columns=columns).recall(flat(states(1, seed=5), 5), 8).logits
    full = lesson().recall(flat(states(1, seed=5)), 8).logits
    assert raised.shape == (1, 5)
    # of a flat row every logit is 0, and e^0 = 1
    few, all_ids = ((logits.exp() - 1)[0] / logits.shape[1] for logits in (raised, full))
    torch.testing.assert_close(few, all_ids[columns])


def test_the_text_is_the_targets(family):
    made = family()
    expected = made.target.generate(PROMPT, generation_config=greedy(60), do_sample=False)
    for gamma in (0, 1, 4):
        result = decode(made, gamma, greedy(60), memory=Memory())
        assert result.sequences.tolist() == expected.tolist()
    texts = {tuple(decode(made, 3, sampled(), memory=m, seed=5).tokens) for m in (None, Memory())}
    assert len(texts) == 1


def test_overlap_is_measured_once_at_every_position(family):
    for gamma in (0, 1, 4):
        for lookup in (None, PromptLookup()):
            result = decode(family(), gamma, sampled(), memory=Memory(), lookup=lookup)
            positions = sorted(p for r in result.rounds for p in r.overlap_position)
            assert positions == list(range(60))


def test_rejection_keeps_the_law(family):
    def decoder(pair):
        return SpeculativeDecoder(pair, policy=Mixed(), memory=Memory(prior=0.1))

    made = family(vocab=VOCAB, layers=1 if family is tiny.pair else 2)
    assert p_value(made, 800, decoder) > ALPHA


def test_what_comes_back_is_drafted_better(family):
    """Text that the target repeats; the memory knows what it said there the first time."""
    made, means = family(), []
    text = torch.tensor([PROMPT[0].tolist() * 12])
    for memory in (None, Memory()):
        session = SpeculativeDecoder(made, policy=make_policy("fixed", gamma=2), memory=memory)
        result = session.generate(text, generation_config=sampled(60), seed=1)
        means.append(result.summary().mean_overlap)
    assert means[1] > 1.1 * means[0]


def test_a_prompt_is_heard_but_not_without_a_memory():
    made = tiny.pair()
    assert make_drafter(made.draft, 64).hears == 0
    decoder = SpeculativeDecoder(
        made, policy=make_policy("fixed", gamma=2), memory=Memory(capacity=8)
    )
    session = decoder.session()
    prompt = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    decoder.generate(prompt, generation_config=greedy(1), session=session)
    assert set(range(13, 20)) <= set(session.drafter.memory._positions.tolist())


@pytest.mark.parametrize(
    ("field", "value"),
    [("capacity", 0), ("width", 0), ("neighbours", -1), ("sharpness", 0.0), ("prior", -1.0),
     ("prior", float("nan")), ("sharpness", float("inf"))],
)  # fmt: skip
def test_settings_that_remember_nothing_are_refused(field, value):
    with pytest.raises(UserError, match=f"memory.{field}: {value}"):
        Memory(**{field: value})


def test_copies_alone_have_no_states_to_remember_by():
    with pytest.raises(UserError, match="prompt_lookup has no states"):
        make_drafter(PromptLookup(), 64, memory=Memory())


def test_what_the_draft_is_never_asked_for_is_not_kept():
    recall = Recall(Memory(capacity=4, width=IDS), None, IDS)
    for first in range(0, 30, 3):
        recall.hear(words(3), first)
    assert sorted(recall._said) == [26, 27, 28, 29]


def test_a_later_turn_is_remembered_without_empty_states():
    decoder = SpeculativeDecoder(
        PAIRS["eagle3"](), policy=make_policy("fixed", gamma=2), memory=Memory()
    )
    session = decoder.session()
    for _ in range(2):
        decoder.generate(PROMPT, generation_config=greedy(20), session=session)
    memory = session.drafter.memory
    norms = np.linalg.norm(memory._keys[: memory._count], axis=1)
    assert (norms > 0.9).all()
