"""The draft learns while it decodes: the text stays the target's, the bases stay as they were."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from peft import PeftModel

from controllers import make_policy
from controllers.mlp import Mlp
from tests import heads, tiny
from tests.test_engine import ARCHITECTURES, PROMPT, greedy, sampled
from tests.test_engine import decode as plain
from tests.test_policies import timed
from tts.cached_model import CachedModel
from tts.coordinator import WARM, Coordinator
from tts.distill.config import DistillConfig
from tts.distill.learner import Learner, teacher_head
from tts.distill.losses import LOSSES
from tts.drafting.autoregressive import AutoregressiveDrafter
from tts.drafting.protocol import Window
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.evidence import Evidence, Rows
from tts.lean import separate
from tts.llama import straighten
from tts.packing import pack
from tts.state import load_state, save_adapter, save_state

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


def test_what_a_lost_adapter_left_in_the_cache_goes_with_it():
    # far too high a rate: what is taken back has to be gone, or the draft stays broken
    config = DistillConfig(stride=4, window=8, rank=4, learning_rate=0.5, max_update_share=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "_step", lose_once(Coordinator._step))
        result = decode(learnable(noise=0.1), sampled(300), config)
    static = decode(learnable(noise=0.1), sampled(300), None)
    late, bare = (
        [x for r in result.rounds for x in r.overlap][-150:] for result in (result, static)
    )
    assert [r.update.event for r in result.rounds if r.update][-1] == "reset"
    assert late == pytest.approx(bare, abs=1e-5)


def lose_once(honest):
    """There is no further update once the adapter was taken back."""

    def step(self, *args):
        record = honest(self, *args)
        if record.event == "reset":
            self.config = dataclasses.replace(self.config, stride=1000, capacity=4000)
        return record

    return step


def test_the_guard_goes_back_to_what_it_has_judged():
    # the thirteenth step destroys the adapter, of which every judgement so far was good
    honest, steps = Learner.step, []

    def step(self, windows, *args):
        done = honest(self, windows, *args)
        steps.append(self.adapter.snapshot())
        if len(steps) == 13:
            with torch.no_grad():
                for parameter in self.adapter.parameters().values():
                    parameter.normal_(std=1.0)
        return done._replace(gain=0.1 if len(steps) < 14 else -3.0)

    restored = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", step)
        patch.setattr(Learner, "restart", lambda self, values: restored.append(values))
        config = DistillConfig(stride=4, window=8, rank=4, learning_rate=0.01, max_update_share=1.0)
        decode(learnable(), sampled(80), config)
    # the gain of step 13 was that of the adapter before it
    assert all(torch.equal(restored[0][name], value) for name, value in steps[11].items())


def test_an_adapter_that_is_no_number_is_taken_back_and_the_text_goes_on():
    honest = Learner.step

    def step(self, windows, *args):
        done = honest(self, windows, *args)
        if self.steps == 3:
            with torch.no_grad():
                for parameter in self.adapter.parameters().values():
                    parameter.fill_(math.nan)
        return done

    for acceptance in ("rejection", "block", "coupled"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "step", step)
            config = DistillConfig(stride=4, window=8, rank=4, max_update_share=1.0)
            result = decode(learnable(), sampled(120), config, acceptance=acceptance)
        assert len(result.tokens) == 120
        events = [r.update.event for r in result.rounds if r.update]
        assert "reset" in events
        assert all(math.isfinite(x) for r in result.rounds for x in r.overlap)


def test_a_sequence_is_learned_alike_the_second_time():
    policy = make_policy("fixed", gamma=4)
    config = dataclasses.replace(EAGER, replay=1)
    decoder = SpeculativeDecoder(learnable(), policy=policy, distill=config, acceptance="coupled")
    losses = [
        [r.update.loss for r in decoder.generate(PROMPT, generation_config=sampled(60)).rounds
         if r.update]
        for _ in range(2)
    ]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("field", ["bias", "logits_scaling", "final_logit_softcapping"])
def test_a_target_whose_logits_are_more_than_its_head_is_not_learned_from(field):
    pair = learnable()
    if field == "bias":
        pair.target.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    else:
        setattr(pair.target.config, field, 8.0)
    with pytest.raises(UserError, match=field):
        SpeculativeDecoder(pair, policy=make_policy("fixed"), distill=EAGER)


def test_a_window_that_a_head_cannot_learn_from_is_refused():
    with pytest.raises(UserError, match="window: 1"):
        SpeculativeDecoder(
            heads.eagle3_pair(), policy=make_policy("fixed"), distill=DistillConfig(window=1)
        )


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
    learner = learner_of(pair, learning_rate=0.05)
    drafter = AutoregressiveDrafter(learner.adapter.live, 64)
    drafter.prefill(TOKENS, None)
    learner.step([window_of(pair, TOKENS)], 1.0)
    learner.adapter.write()
    fresh = CachedModel(learner.adapter.live).feed([*TOKENS[:-1], 5])
    stale = drafter._cached.feed([5])
    drafter.commit(len(TOKENS), None)
    drafter.recompute(TOKENS, 40)
    assert (stale.logits - fresh.logits).abs().max() > 1e-2
    now = drafter._cached.feed([5]).logits
    torch.testing.assert_close(now, fresh.logits, atol=1e-4, rtol=1e-4)


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
    other = decoder(distill=dataclasses.replace(distill, alpha=320.0))
    before = other.policy.network.weights.copy()
    with pytest.raises(UserError, match="alpha"):
        load_state(other, file)
    assert (other.policy.network.weights == before).all()  # all or nothing
    with pytest.raises(UserError, match="cannot write"):
        save_state(one, tmp_path / "nowhere" / "state")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read"):
        load_state(two, file)
    with pytest.raises(UserError, match="cannot read"):
        load_state(two, tmp_path / "none")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
def test_an_adapter_is_written_as_peft_reads_it(tmp_path):
    pair = learnable()
    distill = DistillConfig(stride=1, window=8, rank=4, learning_rate=0.01, max_update_share=1.0)
    policy = make_policy("fixed")
    decoder = SpeculativeDecoder(pair, policy=policy, distill=distill)
    decoder.generate(PROMPT, generation_config=sampled(60))
    save_adapter(decoder, tmp_path)
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        bare = pair.draft(input_ids=tokens).logits
        read = PeftModel.from_pretrained(copy.deepcopy(pair.draft), tmp_path)(tokens).logits
        live = decoder.coordinator.live(input_ids=tokens).logits
    torch.testing.assert_close(read, live)
    assert (live - bare).abs().max() > 0.01
    with pytest.raises(UserError, match="has none"):
        save_adapter(SpeculativeDecoder(pair, policy=policy), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_adapter(decoder, tmp_path / "file")


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
    parts = evidence.windows(8, 100)  # what lies before the prompt, as well
    assert [(part.first, part.end) for part in parts] == [(40, 43), (15, 20)]
    assert [len(part) for part in evidence.windows(100, 42)] == [2, 20]
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
        ("window", 4096), ("stride", 1024), ("beta1", 1.0),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(UserError, match="capacity" if field in ("window", "stride") else field):
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


@pytest.mark.parametrize(("config", "temperature"), [(sampled(10), 0.9), (greedy(10), 1.0)])
def test_the_draft_learns_at_the_temperature_of_decoding(monkeypatch, config, temperature):
    seen, honest = set(), Coordinator.update

    def update(self, lesson, sequence, settled, at):
        seen.add(at)
        return honest(self, lesson, sequence, settled, at)

    monkeypatch.setattr(Coordinator, "update", update)
    decode(learnable(), config)
    assert seen == {temperature}


def test_nothing_is_learned_where_overlap_is_yet_to_be_measured():
    results = [plain(learnable(), 0, sampled(40), seed=3, distill=d) for d in (None, EAGER)]
    assert results[1].summary().num_updates == 0
    overlaps = [result.summary().mean_overlap for result in results]
    assert overlaps[0] == pytest.approx(overlaps[1], abs=1e-6)


def test_the_time_of_rounds_pays_for_updates(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr("tts.stopwatch.Stopwatch._now", lambda self: float(next(seconds)))
    distill = DistillConfig(stride=4, window=8, rank=4, max_update_share=0.9)
    assert decode(learnable(), sampled(40), distill).summary().num_updates > 2


def test_nothing_is_learned_after_the_last_round():
    rounds = decode(learnable(), greedy(20)).rounds
    assert sum(r.update is not None for r in rounds) > 3
    assert rounds[-1].update is None


def course(**fields):
    """A coordinator, a lesson, a function that shows the rows before ``end``; its steps."""
    pair, given = learnable(), {"stride": 4, "window": 8, "rank": 4, "learning_rate": 0.01}
    config = DistillConfig(**given | {"max_update_share": 1.0} | fields)
    coordinator = Coordinator(pair.draft, teacher_head(pair.target), config)
    drafter = AutoregressiveDrafter(coordinator.live, pair.target.config.vocab_size)
    lesson, sequence = coordinator.lesson(drafter), [*TOKENS, *TOKENS[::-1]]
    rows, shown, steps = rows_of(pair.target, sequence), [1], []
    drafter.prefill(sequence, None)

    def teach(end, ms=0.0):
        coordinator.observe(lesson, rows[shown[0] - 1 : end - 1], True, ms)
        shown[0] = end
        return coordinator.update(lesson, sequence[:end], end, 1.0)

    honest = coordinator.learner.step

    def step(*args):
        steps.append(args)
        return honest(*args)

    coordinator.learner.step = step
    return coordinator, lesson, teach, steps


def test_what_updates_took_is_spent(monkeypatch):
    _, _, teach, _ = course(max_update_share=0.1)
    tenths = itertools.count()
    monkeypatch.setattr("tts.coordinator.time.perf_counter", lambda: 0.1 * next(tenths))
    assert teach(9, 1200.0)  # 100 ms are expected, 120 allowed
    assert teach(17, 10.0) is None  # 100 are spent


def test_the_guard_judges_on_rows_that_no_step_has_seen():
    _, _, teach, steps = course()
    assert teach(9)
    assert teach(13)
    windows, _, _, fresh = steps[1]
    assert (windows[0].rows.first, windows[0].rows.end, fresh) == (5, 13, [9])


def test_rows_on_either_side_of_a_prompt_are_learned_and_judged():
    coordinator, lesson, teach, steps = course()
    assert teach(4) is None, "three rows are no stride"
    coordinator.observe(lesson, rows_of(learnable().target, TOKENS)[7:9], True, 0.0)
    record = coordinator.update(lesson, TOKENS[:10], 10, 1.0)
    ((windows, _, bare, fresh),) = steps
    assert [(w.rows.first, w.rows.end) for w in windows] == [(8, 10), (1, 4)]
    assert (fresh, [len(logits) for logits in bare]) == ([8, 1], [2, 3])
    assert record.gain == pytest.approx(0.0, abs=1e-5), "nothing was learned before"
    assert lesson.learned == 10


def test_every_row_counts_alike():
    pair = learnable()
    windows = [window_of(pair, TOKENS), window_of(pair, TOKENS[5:12])]
    counts = [len(window.rows) for window in windows]
    assert counts[0] != counts[1]
    apart = [learner_of(pair).step([window], 1.0).loss for window in windows]
    both = learner_of(pair).step(windows, 1.0).loss
    assert both == pytest.approx(np.average(apart, weights=counts))


def test_the_best_adapter_is_kept():
    coordinator, *_ = course()
    coordinator._updates = WARM
    best = coordinator.learner.adapter.snapshot()
    coordinator._judge(0.2, best)
    coordinator._judge(0.0, {})
    assert coordinator._gain > 0.01
    assert coordinator._good is best


def test_a_new_sequence_is_judged_anew():
    coordinator, lesson, teach, _ = course()
    teach(9)
    coordinator._gain, coordinator._best, coordinator._patience = -0.1, 0.3, 4
    coordinator.lesson(lesson.drafter)
    state = coordinator.state_dict()
    assert [state[n] for n in ("gain", "best", "updates", "patience")] == [0, 0, 0, 1]


def test_after_a_taking_back_judgement_begins_anew_at_half_the_rate():
    coordinator, *_ = course()
    coordinator._updates, coordinator._gain = WARM, -0.5
    rate = coordinator.learner.rate
    assert coordinator._judge(-0.5, {}) == "reset"
    assert (coordinator._gain, coordinator._updates) == (0, 0)
    assert coordinator.learner.rate == rate / 2


def test_what_is_replayed_is_older_than_the_newest_window():
    _, _, teach, steps = course(replay=2, window=4)
    for end in range(5, 30, 4):
        teach(end)
    assert any(len(windows) > 1 for windows, *_ in steps)
    for (newest, *older), *_ in steps:
        assert all(window.rows.end <= newest.rows.first for window in older)


def test_what_is_drawn_ends_before_the_position():
    evidence, random = Evidence(100), torch.Generator().manual_seed(0)
    for first in (0, 5, 10):
        evidence.add(Rows(first, torch.zeros(5, 1)))
    assert {evidence.draw(4, 12, random).end for _ in range(40)} == {5, 10}
    assert evidence.draw(4, 3, random) is None


def test_the_best_adapter_and_the_draws_are_saved():
    one, two = course()[0], course()[0]
    one._updates = WARM
    one._judge(0.5, one.learner.adapter.snapshot())
    torch.rand(3, generator=one.learner.random)
    two.load_state_dict(one.state_dict())
    assert two._good.keys() == one._good.keys()
    assert torch.equal(one.learner.random.get_state(), two.learner.random.get_state())


def test_the_bare_draft_of_a_second_sequence_has_keys_of_its_own():
    coordinator, _, teach, steps = course(scope="session")
    assert teach(9)
    drafter, sequence = AutoregressiveDrafter(coordinator.live, 64), [*TOKENS[::-1], *TOKENS]
    second = coordinator.lesson(drafter)
    drafter.prefill(sequence, None)
    rows = rows_of(tiny.model("llama3.1"), sequence)
    coordinator.observe(second, rows[20:], True, 0.0)
    assert coordinator.update(second, sequence, len(sequence), 1.0)
    *_, (bare,), (fresh,) = steps[-1]
    expected = coordinator._draft(torch.tensor([sequence])).logits[0, fresh - 1 : -1]
    torch.testing.assert_close(bare, expected, atol=1e-4, rtol=1e-4)


def learner_of(pair, **fields):
    config = DistillConfig(rank=4, **fields)
    return Learner(pair.draft, AutoregressiveDrafter, teacher_head(pair.target), config)


def test_the_teacher_is_the_target_at_the_temperature():
    pair = learnable()
    said = learner_of(pair).log_p(rows_of(pair.target, TOKENS), 0.5)
    expected = (pair.target(torch.tensor([TOKENS[:-1]])).logits[0] / 0.5).log_softmax(-1)
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)


def test_a_learner_that_begins_anew_has_no_moments():
    pair = learnable()
    learner = learner_of(pair, learning_rate=0.01)
    for goes_on, rate in ((lambda: learner.restart(None), 0.005), (learner.reset, 0.01)):
        learner.step([window_of(pair, TOKENS)], 1.0)
        goes_on()
        assert learner.rate == rate
        assert not any(name.startswith("optimizer.") for name in learner.state_dict())
        assert not learner.taught


def test_divergences_by_hand():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.3, 0.6]])
    middle = (p + q) / 2

    def kl(a, b):
        return float((a * (a / b).log()).sum())

    expected = {
        "forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, middle) + kl(q, middle)) / 2
    }  # fmt: skip
    for name, value in expected.items():
        assert LOSSES[name](p.log(), q.log()).item() == pytest.approx(value, abs=1e-6)
