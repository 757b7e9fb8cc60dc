"""What every drafter of a paper must do: the target's text, its law, an exact replay."""

import pytest
import torch

from controllers import make_policy
from tests.heads import PAIRS
from tests.test_engine import PROMPT, decode, greedy, sampled
from tests.test_laws import ALPHA, VOCAB, honest, learning, p_value
from tts.acceptance import Coupled, Verdict
from tts.distill.config import DistillConfig
from tts.engine import SpeculativeDecoder
from tts.errors import UserError

EAGER = DistillConfig(stride=1, window=8, rank=4, learning_rate=0.01, max_update_share=1.0)


@pytest.fixture(params=PAIRS)
def family(request):
    return PAIRS[request.param]


def test_greedy_text_is_the_targets_with_and_without_updates(family):
    made = family()
    for fields in ({}, {"repetition_penalty": 1.3}):
        config = greedy(50, **fields)
        expected = made.target.generate(PROMPT, generation_config=config, do_sample=False)
        for gamma in (0, 1, 8):
            assert decode(made, gamma, config).sequences.tolist() == expected.tolist()
        learned = decode(made, 4, config, distill=EAGER)
        assert learned.sequences.tolist() == expected.tolist()
        assert learned.summary().num_updates > 5


def test_coupled_text_does_not_depend_on_gamma_draft_window_or_updates(family):
    texts = set()
    for seed in (0, 1):
        made = family(seed=seed)
        for gamma in (0, 1, 4):
            texts.add(tuple(decode(made, gamma, sampled(), seed=5).tokens))
        texts.add(tuple(decode(made, 4, sampled(), seed=5, draft_window=8).tokens))
        texts.add(tuple(decode(made, 4, sampled(), seed=5, distill=EAGER).tokens))
    assert len(texts) == 1


def test_overlap_is_measured_once_at_every_position(family):
    for gamma in (0, 1, 4):
        result = decode(family(), gamma, sampled(), seed=3)
        positions = sorted(p for r in result.rounds for p in r.overlap_position)
        assert positions == list(range(60))


@pytest.mark.parametrize(
    ("decoder", "samples"),
    [(honest, 800)]
    + [pytest.param(decoder, 4000, marks=pytest.mark.slow) for decoder in (honest, learning)],
)
def test_rejection_keeps_the_law(family, decoder, samples):
    made = family(vocab=VOCAB, layers=2, ids=torch.tensor([0, 1, 3, 4, 6, 7]))
    assert p_value(made, samples, decoder) > ALPHA


def test_a_sequence_of_one_token_has_no_pair_and_is_drafted_from_all_the_same(family):
    prompt = torch.tensor([[7]])
    made = family()
    expected = made.target.generate(prompt, generation_config=greedy(30), do_sample=False)
    assert decode(made, 3, greedy(30), prompt=prompt).sequences.tolist() == expected.tolist()


def test_a_session_goes_on_as_if_the_prompt_had_been_whole(family):
    made, more = family(), torch.tensor([[8, 8, 30]])
    decoder = SpeculativeDecoder(made, policy=make_policy("fixed", gamma=3))
    session = decoder.session()
    first = decoder.generate(PROMPT, generation_config=greedy(20), session=session)
    second = decoder.generate(more, generation_config=greedy(20), session=session)
    whole = torch.cat([first.sequences, more], 1)
    fresh = decoder.generate(whole, generation_config=greedy(20))
    assert second.sequences.tolist() == fresh.sequences.tolist()
    overlaps = [[x for r in result.rounds for x in r.overlap] for result in (second, fresh)]
    assert overlaps[0][-20:] == pytest.approx(overlaps[1][-20:], abs=1e-4)


@pytest.mark.parametrize("window", [None, 7])
def test_the_replay_is_what_was_drafted(family, window):
    check_replay(family, window)


def check_replay(family, window=None):
    """Every row that drafted comes out of one replay of its window."""
    made = family()
    decoder = SpeculativeDecoder(
        made, policy=make_policy("fixed", gamma=3), acceptance="coupled", draft_window=window,
        distill=DistillConfig(stride=512, window=40, max_update_share=1.0),
    )  # fmt: skip
    session = decoder.session()
    warped, begin = {}, session.drafter.begin

    def watched(warper):
        begin(warper)
        honest_warp = session.drafter._warp

        def warp(logits, sequence, first):
            for j, row in enumerate(logits):
                warped[first + j, tuple(sequence[: first + j])] = row, len(roots)
            return honest_warp(logits, sequence, first)

        session.drafter._warp = warp

    session.drafter.begin = watched
    roots = []
    with pytest.MonkeyPatch.context() as patch:
        # whatever is drafted is kept, so that every step of a chain has a replay
        patch.setattr(Coupled, "judge", lambda rule, p, q, drafts, first: Verdict(len(drafts), 7))
        result = decoder.generate(
            PROMPT, generation_config=sampled(), seed=3, session=session, on_round=roots.append
        )
        # an update replays fewer steps than are drafted here
        patch.setattr("tts.drafting.eagle3.DEPTH", 4)
        rows = session.lesson.evidence.window(40, len(session.sequence) - 1)
        said = session.drafter.replay(made.draft, session.drafter.window(session.sequence, rows))
    starts = torch.tensor([0, *(r.num_emitted for r in result.rounds)]).cumsum(0) + 5
    compared = [0] * 4
    depth_of = (said.weight.log() / torch.tensor(0.8).log()).round().long()
    for (position, _), (row, round_) in warped.items():
        depth = position - int(starts[round_])
        if depth < 0:
            continue  # a late row, of a position that nothing was drafted for
        same = (said.row + rows.first == position) & (depth_of == depth)
        if same.any():
            torch.testing.assert_close(said.logits[same][0], row, atol=1e-4, rtol=1e-4)
            compared[depth] += 1
    assert min(compared[:3]) > 3


def test_the_draft_gets_better_while_it_decodes(family):
    made = family()
    config = sampled(400)
    distill = DistillConfig(
        stride=8, window=16, rank=8, learning_rate=0.01, max_update_share=1.0, guard=False
    )
    curves = []
    for learner in (None, distill):
        result = decode(made, 3, config, seed=1, distill=learner)
        late = [
            v
            for r in result.rounds
            for p, v in zip(r.overlap_position, r.overlap, strict=True)
            if p >= 200
        ]
        curves.append((result.tokens, sum(late) / len(late)))
    assert curves[0][0] == curves[1][0]
    assert curves[1][1] > 1.1 * curves[0][1]


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_layers_that_would_stale_the_keys_are_refused(name):
    with pytest.raises(UserError, match="targets: k_proj"):
        decode(PAIRS[name](), 3, greedy(5), distill=DistillConfig(targets=("q_proj", "k_proj")))


def test_below_the_last_layer_of_a_head_nothing_is_adapted():
    made = PAIRS["eagle3"](num_hidden_layers=2)
    decode(made, 3, greedy(5), distill=EAGER)
    with pytest.raises(UserError, match="layers: 0 would leave"):
        decode(made, 3, greedy(5), distill=DistillConfig(layers=(0, 1)))
