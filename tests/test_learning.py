"""The draft learns while it decodes: the text stays the target's, the bases stay as they were."""

import copy
import itertools
import math

import pytest
import torch

from controllers import make_policy
from controllers.mlp import Mlp
from tests import tiny
from tests.test_engine import ARCHITECTURES, PROMPT, greedy, sampled
from tests.test_policies import timed
from tts.cached_model import CachedModel
from tts.coordinator import Coordinator
from tts.distill.config import DistillConfig
from tts.distill.learner import Learner
from tts.drafting.autoregressive import AutoregressiveDrafter
from tts.drafting.protocol import Window
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.evidence import Evidence, Rows
from tts.lean import separate
from tts.llama import straighten
from tts.packing import pack
from tts.state import load_state, save_state

EAGER = DistillConfig(stride=1, window=8, rank=4, learning_rate=0.01, max_update_share=1.0)
POLICIES = ["fixed", "mlp"]


def decode(pair, config, distill=EAGER, policy="fixed", acceptance="coupled", seed=0, **kwargs):
    policy = make_policy(policy)
    if isinstance(policy, Mlp):  # at the costs of a tiny model drafting never pays
        timed(policy)
    decoder = SpeculativeDecoder(pair, policy=policy, distill=distill, acceptance=acceptance)
    return decoder.generate(PROMPT, generation_config=config, seed=seed, **kwargs)


def learnable(architecture="llama3.1", noise=0.4, **kwargs):
    """A pair whose draft shares embedding and head with its target, as the shipped one does."""
    pair = tiny.pair(architecture, noise=noise, **kwargs)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getattr(pair.draft, name)().weight.copy_(getattr(pair.target, name)().weight)
    return pair


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("architecture", ["llama3.1", "qwen3"])
def test_greedy_equals_the_target_with_an_update_after_every_round(architecture, policy):
    pair = tiny.pair(architecture, noise=0.1)
    for fields in ({}, {"repetition_penalty": 1.3}):
        expected = pair.target.generate(PROMPT, generation_config=greedy(60, **fields))
        result = decode(pair, greedy(60, **fields), policy=policy)
        assert result.sequences.tolist() == expected.tolist()
        assert result.summary().num_updates > 5


@pytest.mark.parametrize("policy", POLICIES)
def test_coupled_text_does_not_depend_on_updates(policy):
    pair = learnable()
    alone = decode(pair, sampled(), None, seed=5).tokens
    learned = decode(pair, sampled(), policy=policy, seed=5)
    assert learned.tokens == alone
    assert learned.rounds[-1].adapted


def test_base_weights_are_bit_identical_after_a_run():
    pair = learnable()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (pair.target, pair.draft)]
    decode(pair, sampled())
    for model, old in zip((pair.target, pair.draft), before, strict=True):
        assert model.state_dict().keys() == old.keys()
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())


def test_q_is_that_of_the_draft_that_drafted():
    """Overlap at each position is that of the weights that were live then, whatever gamma."""
    pair = learnable()
    curves = []
    for gamma in (1, 4):
        decoder = SpeculativeDecoder(
            pair, policy=make_policy("fixed", gamma=gamma), distill=EAGER, acceptance="coupled"
        )
        coordinator = decoder.coordinator
        step, seen = coordinator.update, []

        def watched(*args, step=step, seen=seen, coordinator=coordinator):
            seen.append(coordinator.learner.adapter.version)
            return step(*args)

        coordinator.update = watched
        result = decoder.generate(PROMPT, generation_config=sampled(), seed=3)
        positions = [p for r in result.rounds for p in r.overlap_position]
        assert sorted(positions) == list(range(60))
        curves.append(seen[-1])
    assert min(curves) > 5


def test_the_draft_gets_better_while_it_decodes():
    pair = learnable()
    config = sampled(400)
    static = decode(pair, config, None, seed=1)
    online = decode(pair, config, DistillConfig(
        stride=8, window=16, rank=8, learning_rate=0.01, max_update_share=1.0), seed=1)  # fmt: skip
    assert online.tokens == static.tokens

    def late(result):
        points = [
            v for r in result.rounds for p, v in zip(r.overlap_position, r.overlap, strict=True)
            if p >= 200
        ]  # fmt: skip
        return sum(points) / len(points)

    assert late(online) > 1.1 * late(static)


def test_updates_that_gain_nothing_become_rarer():
    def updates(learning_rate):
        config = DistillConfig(
            stride=8, window=16, rank=8, learning_rate=learning_rate, max_update_share=1.0
        )
        rounds = decode(learnable(), sampled(600), config, seed=1).rounds
        return [r.position for r in rounds if r.update is not None]

    often, rarely = updates(0.01), updates(1e-7)
    assert len(often) > 2 * len(rarely)
    assert all(b - a > 3 * 8 for a, b in itertools.pairwise(rarely[5:]))


def rows_of(target, tokens, head=None):
    """Evidence for tokens[1:], every one."""
    cached = CachedModel(target)
    rows = cached.feed(tokens[:-1], keep=len(tokens) - 1)
    hidden = rows.hidden if head is None else rows.hidden @ head
    return Rows(1, hidden.clone())


def empty_prefix(draft):
    layers, c = draft.config.num_hidden_layers, draft.config
    empty = torch.zeros(1, c.num_key_value_heads, 0, c.head_dim, dtype=draft.dtype)
    return [(empty, empty)] * layers


def window_of(pair, tokens, **kwargs):
    return Window(rows_of(pair.target, tokens, **kwargs), tokens[:-1], empty_prefix(pair.draft))


TOKENS = [3, 17, 5, 40, 9, 33, 21, 8, 60, 2, 14, 7, 50, 31, 12, 6]


@pytest.mark.parametrize("loss", ["overlap", "forward_kl", "reverse_kl", "jsd"])
def test_a_step_lowers_the_loss_on_its_own_evidence(loss):
    pair = learnable()
    head = pair.target.get_output_embeddings().weight
    learner = Learner(
        pair.draft,
        AutoregressiveDrafter,
        head,
        DistillConfig(loss=loss, rank=4, learning_rate=0.01),
    )
    window = window_of(pair, TOKENS)
    first = learner.step([window], 1.0)
    for _ in range(5):
        last = learner.step([window], 1.0)
    assert last.loss < first.loss
    assert 0 <= first.lost_mass < 1e-4


def test_a_drifting_target_is_tracked():
    """The target changes its mind for good: overlap falls, and comes back by learning."""
    pair = learnable()
    learner = Learner(
        pair.draft, AutoregressiveDrafter, pair.target.get_output_embeddings().weight,
        DistillConfig(rank=8, learning_rate=0.01),
    )  # fmt: skip
    torch.manual_seed(0)
    changed = torch.linalg.qr(torch.randn(32, 32)).Q
    texts = torch.randint(0, 64, (80, 24)).tolist()
    early = [learner.step([window_of(pair, t)], 1.0).overlap for t in texts[:20]]
    late = [learner.step([window_of(pair, t, head=changed)], 1.0).overlap for t in texts]
    fallen, tracked = sum(late[:3]) / 3, sum(late[-10:]) / 10
    assert fallen < sum(early[-5:]) / 5
    assert tracked > 1.1 * fallen


def test_a_step_that_is_not_finite_moves_nothing():
    pair = learnable()
    learner = Learner(
        pair.draft, AutoregressiveDrafter, pair.target.get_output_embeddings().weight, EAGER
    )
    before = learner.adapter.snapshot()
    window = window_of(pair, TOKENS)
    window.rows.hidden[0, 0] = math.nan
    assert learner.step([window], 1.0).skipped
    after = learner.adapter.snapshot()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 40])
def test_live_weights_are_base_plus_ba_and_the_rewrite_forgets_nothing(dtype, rows):
    pair = learnable()
    for model in (pair.target, pair.draft):
        pack(model.to(dtype))
    learner = Learner(
        pair.draft, AutoregressiveDrafter, pair.target.get_output_embeddings().weight, EAGER
    )
    learner.step([window_of(pair, TOKENS)], 1.0)
    learner.adapter.write()
    tokens = torch.tensor([(TOKENS * 3)[:rows]])
    with torch.no_grad():
        live, bare = learner.adapter.live(input_ids=tokens).logits, pair.draft(input_ids=tokens)
        models = [learner.adapter.live, learner.adapter.model]
        if dtype == torch.float32:  # it is the weights that are compared, not how sums are rounded
            models = [copy.deepcopy(model).double() for model in models]
            tolerance = {"rtol": 1.3e-6, "atol": 1e-5}  # those of float32
        else:
            tolerance = {"rtol": 0.1, "atol": 0.2}
        said, expected = (model(input_ids=tokens).logits for model in models)
        torch.testing.assert_close(said, expected, **tolerance)
        assert (live - bare.logits).abs().max() > 0.1
        learner.reset()
        learner.adapter.write()
        assert torch.equal(learner.adapter.live(input_ids=tokens).logits, bare.logits)


def test_joined_layers_draft_with_what_was_learned():
    pair = learnable()
    for model in (pair.target, pair.draft):
        model.bfloat16()
    pair.draft.set_attn_implementation("tts")
    pack(pair.draft)
    straighten(pair.draft, torch.float32)
    head = pair.target.get_output_embeddings().weight
    learner = Learner(pair.draft, AutoregressiveDrafter, head, EAGER)
    learner.step([window_of(pair, TOKENS)], 1.0)
    learner.adapter.write()

    def said(model):
        return CachedModel(model).feed(TOKENS[:3], keep=3).hidden

    joined, bare = said(learner.adapter.live), said(pair.draft)
    for module in learner.adapter.live.modules():
        separate(module)
    torch.testing.assert_close(joined, said(learner.adapter.live), rtol=2**-6, atol=2**-6)
    assert (joined - bare).abs().max() > 0.1


def check_the_guard_takes_back(after, event):
    """From its ``after``-th step on the learner destroys what it learned; the guard notices."""
    honest = Learner.step

    def step(self, windows, *args):
        done = honest(self, windows, *args)
        if self.steps > after:
            with torch.no_grad():
                for parameter in self.adapter.parameters().values():
                    parameter.normal_(std=1.0)
        return done

    distill = DistillConfig(stride=4, window=8, rank=4, learning_rate=0.01, max_update_share=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", step)
        result = decode(learnable(), sampled(400), distill)
    events = [r.update.event for r in result.rounds if r.update is not None]
    assert event in events
    summary = result.summary()
    assert summary.num_taken_back == sum(e is not None for e in events)
    assert not result.rounds[0].adapted
    assert summary.adapted_share < 1


@pytest.mark.parametrize(("after", "event"), [(0, "reset"), (30, "restored")])
def test_the_guard_takes_back_what_loses(after, event):
    check_the_guard_takes_back(after, event)


def test_learning_stops_within_its_share_of_time():
    pair = learnable()
    distill = DistillConfig(stride=1, window=8, rank=4, max_update_share=0.02)
    summary = decode(pair, sampled(200), distill).summary()
    assert summary.num_updates < len(decode(pair, sampled(200)).rounds) / 2


def test_the_time_of_a_round_holds_its_update():
    learned = [r for r in decode(learnable(), greedy(40)).rounds if r.update is not None]
    assert len(learned) > 5
    for r in learned:
        assert r.total_ms >= r.draft_ms + r.verify_ms + r.policy_ms + r.update.update_ms


@pytest.mark.parametrize("guard", [True, False])
def test_the_proximal_term_holds_the_adapter_near_the_bare_draft(guard):
    pair = learnable()
    moved = []
    for proximal in (0.0, 100.0):
        distill = DistillConfig(
            stride=4, window=8, rank=4, learning_rate=1e-3, max_update_share=1.0,
            proximal=proximal, guard=guard, clip=1e9,
        )  # fmt: skip
        decoder = SpeculativeDecoder(pair, policy=make_policy("fixed"), distill=distill)
        decoder.generate(PROMPT, generation_config=sampled(18))  # too few to be judged
        tokens = torch.tensor([TOKENS])
        with torch.no_grad():
            live = decoder.coordinator.live(input_ids=tokens).logits
            moved.append((live - pair.draft(input_ids=tokens).logits).abs().mean())
    assert moved[1] < 0.8 * moved[0]


def test_scope_sequence_forgets_and_scope_session_carries_on():
    pair = learnable()
    for scope, carried in (("sequence", False), ("session", True)):
        distill = DistillConfig(stride=1, window=8, rank=4, max_update_share=1.0, scope=scope)
        decoder = SpeculativeDecoder(pair, policy=make_policy("fixed"), distill=distill)
        decoder.generate(PROMPT, generation_config=sampled())
        assert decoder.coordinator.adapted
        decoder.session()
        assert decoder.coordinator.adapted is carried


def test_recomputed_keys_are_those_of_the_weights_as_they_are():
    pair = learnable()
    results = {
        keys: decode(
            pair, sampled(),
            DistillConfig(stride=1, window=8, rank=4, learning_rate=0.01, max_update_share=1.0,
                          keys=keys),
        )
        for keys in ("keep", "recompute")
    }  # fmt: skip
    assert results["keep"].tokens == results["recompute"].tokens
    kept, recomputed = (results[k].summary().mean_overlap for k in ("keep", "recompute"))
    assert kept != recomputed


def test_state_goes_on_where_it_was_saved():
    pair = learnable()
    head = pair.target.get_output_embeddings().weight
    one = Learner(pair.draft, AutoregressiveDrafter, head, EAGER)
    window = window_of(pair, TOKENS)
    one.step([window], 1.0)
    two = Learner(pair.draft, AutoregressiveDrafter, head, EAGER)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert one.step([window], 1.0).loss == two.step([window], 1.0).loss
    for name, value in one.adapter.snapshot().items():
        assert torch.equal(value, two.adapter.snapshot()[name])
    other = Learner(pair.draft, AutoregressiveDrafter, head, DistillConfig(rank=2))
    with pytest.raises(UserError, match="another draft, rank"):
        other.load_state_dict(one.state_dict())


def test_a_saved_state_goes_on_in_another_decoder(tmp_path):
    pair = learnable()
    distill = DistillConfig(
        stride=1, window=8, rank=4, learning_rate=0.01, max_update_share=1.0, scope="session"
    )

    def decoder(**kwargs):
        kwargs = {"policy": make_policy("mlp"), "distill": distill} | kwargs
        return SpeculativeDecoder(pair, **kwargs)

    one, two, file = decoder(), decoder(), tmp_path / "state.safetensors"
    timed(one.policy)
    one.generate(PROMPT, generation_config=sampled(120))
    save_state(one, file)
    load_state(two, file)
    assert (one.policy.network.weights == two.policy.network.weights).all()
    assert one.coordinator.learner.steps == two.coordinator.learner.steps > 3
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        live = [d.coordinator.live(input_ids=tokens).logits for d in (one, two)]
    torch.testing.assert_close(*live)
    with pytest.raises(UserError, match="another policy"):
        load_state(decoder(distill=None), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read"):
        load_state(two, file)
    with pytest.raises(UserError, match="cannot read"):
        load_state(two, tmp_path / "none")


def test_evidence_is_bounded_and_windows_never_span_a_prompt():
    evidence = Evidence(capacity=32)

    def add(first, count):
        hidden = torch.arange(first, first + count)[:, None].float()
        evidence.add(Rows(first, hidden))

    for first in range(0, 20, 5):
        add(first, 5)
    add(40, 3)
    window = evidence.window(8, 100)
    assert (window.first, window.end) == (40, 43)
    window = evidence.window(8, 19)
    assert (window.first, window.end) == (11, 19)
    assert window.hidden[:, 0].tolist() == list(range(11, 19))
    assert evidence.since(18) == 5
    assert evidence.window(8, 0) is None
    for first in range(100, 400, 10):
        add(first, 10)
    assert 32 <= len(evidence) < 42


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", "mse"), ("rank", 0), ("learning_rate", float("nan")), ("learning_rate", -1.0),
        ("scope", "forever"), ("keys", "burn"), ("max_update_share", 0.0),
        ("window", 4096), ("beta1", 1.0),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(UserError, match="capacity" if field == "window" else field):
        DistillConfig(**{field: value})


def test_targets_that_match_nothing_are_refused():
    pair = learnable()
    with pytest.raises(UserError, match="targets"):
        Coordinator(
            pair.draft, pair.target.get_output_embeddings().weight, DistillConfig(targets=("no",))
        )


@pytest.mark.parametrize("draft_window", [None, 3, 8])
def test_the_learner_sees_what_the_draft_sees(draft_window):
    pair = learnable()
    config = DistillConfig(stride=4, window=8, max_update_share=1.0)
    coordinator = Coordinator(pair.draft, pair.target.get_output_embeddings().weight, config)
    drafter = AutoregressiveDrafter(coordinator.live, pair.target.config.vocab_size, draft_window)
    lesson = coordinator.lesson(drafter)
    sequence = [*PROMPT[0].tolist(), *TOKENS]
    drafter.prefill(sequence, None)
    said = pair.target(torch.tensor([sequence]), output_hidden_states=True)
    first = len(sequence) - 8
    rows = Rows(first, said.hidden_states[-1][0, first - 1 : -1])
    coordinator.observe(lesson, rows, True, 0.0)
    steps = []
    step = coordinator.learner.step
    coordinator.learner.step = lambda *args: steps.append(step(*args)) or steps[-1]
    assert coordinator.update(lesson, sequence, len(sequence), 1.0)
    assert steps[0].gain == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "llama3.1"])
def test_other_architectures_learn_or_say_why_not(architecture):
    pair = tiny.pair(architecture, noise=0.1)
    if architecture == "qwen3.5":
        with pytest.raises(UserError, match="recurrent"):
            decode(pair, sampled())
        return
    alone = decode(pair, sampled(), None, seed=5).tokens
    assert decode(pair, sampled(), seed=5).tokens == alone
