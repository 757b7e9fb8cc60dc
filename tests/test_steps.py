"""Step records, what is fitted to them, and what is refused."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers import CAP, make_policy
from controllers.mlp import Mlp
from experiments import fit, replay, signals, steps
from experiments.cli import main
from experiments.collect import InTurn
from tests import tiny
from tts.errors import UserError
from tts.fingerprint import model_fingerprint
from tts.policy import RoundOutcome, RoundState, Signals

ROUND_MS = [10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0]


def step(prompt="code-01", index=0, accepted=2, compression="none", **changes):
    values = {
        "compression": compression, "gamma": 8, "task": prompt.split("-")[0], "step": index,
        "accepted": accepted, "acceptance_rate": accepted / 8, "tokens_produced": accepted + 1,
        "mean_draft_entropy": 1.0, "mean_draft_confidence": 0.5, "max_draft_entropy": 2.0,
        "min_draft_confidence": 0.1, "prompt": prompt, "position": index, "context_length": 20,
        "entropy": [1.0] * 8, "confidence": [0.5] * 8, "probability": [0.5] * 8,
        "acceptance": [0.9] * min(accepted + 1, 8), "draft_ms": 8.0, "verify_ms": 30.0,
        "round_ms": ROUND_MS,
    }  # fmt: skip
    return steps.Step(**(values | changes))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Records of a tiny pair, five prompts of two tasks, and the draft that drafted."""
    root = tmp_path_factory.mktemp("records")
    target = tiny.model("llama3.1")
    draft = tiny.noisy(target, 0.1)
    tiny.save(target, root / "target")
    tiny.save(draft, root / "draft")
    prompts = [{"id": f"{task}-{i}", "turns": ["abc"[i % 3] * (i + 1)]}
               for task in ("code", "chat") for i in range(5)]  # fmt: skip
    (root / "tasks.json").write_text(json.dumps({"conversations": prompts}))
    code = main([
        "profile", f"--target={root / 'target'}", f"--draft={root / 'draft'}", "--dtype=float32",
        f"--workload={root / 'tasks.json'}", "--max-new-tokens=22", "--compressions=[none,int8]",
        f"--records={root / 'steps.jsonl'}",
    ])  # fmt: skip
    assert code == 0
    return root


def test_every_step_says_what_all_shorter_lengths_would_have_given(recorded):
    rows = steps.read(str(recorded / "steps.jsonl"))
    assert {r.compression for r in rows} == {"none", "int8"}
    assert {r.task for r in rows} == {"code", "chat"}
    for r in rows:
        assert r.gamma == 8 == len(r.entropy) == len(r.round_ms) - 1
        assert r.tokens_produced == r.accepted + 1
        assert len(r.acceptance) == min(r.accepted + 1, 8)
        assert r.mean_draft_entropy == pytest.approx(np.mean(r.entropy) / np.log(2))
    by_prompt = [r for r in rows if (r.compression, r.prompt) == ("none", "code-0")]
    positions = [r.position for r in by_prompt]
    emitted = np.cumsum([0, *(r.tokens_produced for r in by_prompt[:-1])])
    assert positions == emitted.tolist()


def test_the_states_beside_the_records_are_those_of_the_draft(recorded):
    rows = steps.read(str(recorded / "steps.jsonl"))
    hidden, draft = steps.read_hidden(str(recorded / "steps.jsonl"), len(rows))
    assert hidden.shape == (len(rows), 8, 32)
    saved = tiny.noisy(tiny.model("llama3.1"), 0.1)
    assert draft == model_fingerprint(saved)
    assert draft != model_fingerprint(tiny.noisy(tiny.model("llama3.1"), 0.2))
    assert draft == model_fingerprint(saved.bfloat16())
    # the state that a token was drawn from gives its confidence
    logits = saved.lm_head(hidden[0].bfloat16()).float()
    confidence = logits.softmax(-1).amax(-1)
    np.testing.assert_allclose(confidence.detach().numpy(), rows[0].confidence, atol=0.03)


def test_fit_writes_what_the_policies_start_from(recorded, tmp_path, capsys):
    out = tmp_path / "weights"
    code = main(["fit", f"--records=[{recorded / 'steps.jsonl'}]", f"--out={out}", "--epochs=3"])
    printed = capsys.readouterr().out
    assert code == 0
    summary = json.loads(printed.strip().splitlines()[-1])
    assert {f.name for f in out.iterdir()} == {"mlp.json", "speckv.json", "specdecpp.safetensors"}
    assert set(summary["tok_s"]) == {"none", "int8"}
    draft = model_fingerprint(tiny.noisy(tiny.model("llama3.1"), 0.1))
    for name in ("mlp", "speckv", "specdecpp"):
        policy = make_policy(name, weights=out, draft=draft)
        assert 0 <= policy.plan(step().state) <= CAP
        assert 0 < summary["predictions"][name]["calibration_error"] < 0.5
    with pytest.raises(UserError, match="another draft"):
        make_policy("specdecpp", weights=out, draft="other")


def test_replay_scores_a_length_by_the_recorded_outcome_and_the_measured_time():
    rows = [step(accepted=a, index=i) for i, a in enumerate((0, 3, 8))]
    hidden = torch.zeros(3, 8, 4)
    found = replay.replay(replay.fixed(4), rows, hidden)
    assert found.tolist() == [[1, 18], [4, 18], [5, 18]]
    assert replay.replay(replay.oracle, rows, hidden).tolist() == [[1, 12], [4, 18], [9, 26]]
    assert replay.tok_s(found) == pytest.approx(1000 * 10 / 54)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(0, 8))
def test_a_policy_replayed_is_a_fixed_length_where_it_never_stops(accepted, gamma):
    rows = [step(accepted=a, index=i) for i, a in enumerate(accepted)]
    hidden = torch.zeros(len(rows), 8, 4)
    policy = make_policy("fixed", gamma=gamma)
    played = replay.replay(replay.follow(policy), rows, hidden)
    assert np.array_equal(played, replay.replay(replay.fixed(gamma), rows, hidden))


def test_the_mlp_learns_in_a_replay_from_what_it_drafted():
    rows = [step(accepted=i % 3, index=i) for i in range(200)]
    policy = Mlp()
    before = policy.network.weights.copy()
    replay.replay(replay.follow(policy), rows, torch.zeros(200, 8, 4))
    assert (policy.network.weights != before).any()


def test_the_best_length_by_time_is_shorter_than_by_tokens():
    found = signals.best_gamma([step(accepted=a) for a in (0, 1, 2, 8)])
    assert found["tokens_per_step"][:3] == [1.0, 1.75, 2.25]
    assert found["best_by_tokens"] == 8
    assert found["tok_s"][2] == pytest.approx(1000 * 2.25 / 14)
    assert found["best_by_time"] == int(np.argmax(found["tok_s"]))


def test_prompts_that_are_alike_inside_are_worth_their_number():
    prompts = np.repeat(["a", "b", "c", "d"], 10)
    alike = np.repeat([0.0, 1.0, 2.0, 3.0], 10)
    assert signals.effective_n(alike, prompts) == pytest.approx(4)
    noise = np.tile([0.0, 1.0], 20)  # every prompt has the same values
    assert signals.effective_n(noise, prompts) == pytest.approx(40)


def test_the_split_keeps_prompts_whole():
    rows = [step(f"{task}-{i:02}", index=j) for task in ("code", "math") for i in range(10)
            for j in range(3)]  # fmt: skip
    parts = fit.split(fit.Data(rows, torch.zeros(len(rows), 8, 2)))
    prompts = [{s.prompt for s in part.steps} for part in parts]
    assert [len(p) for p in prompts] == [12, 4, 4]
    assert not prompts[0] & prompts[1] | prompts[1] & prompts[2] | prompts[0] & prompts[2]
    assert [len(part.hidden) for part in parts] == [len(part.steps) for part in parts]


def test_reliability_of_true_probabilities_is_the_diagonal():
    random = np.random.default_rng(0)
    predicted = random.random(20_000)
    found = replay.reliability(predicted, (random.random(20_000) < predicted).astype(float))
    assert found["calibration_error"] < 0.02
    assert found["correlation"] > 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "records: no file"),
        ("", "is empty"),
        ("x", "no JSON object"),
        ('{"compression": "none"}', "has no column gamma"),
        ({"draft_ms": float("nan")}, "no number in draft_ms"),
        ({"entropy": [1.0, None]}, "no number in entropy"),
        ({}, "cannot read"),  # no states beside it
    ],
)
def test_records_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, capsys, content, message):
    file = tmp_path / "steps.jsonl"
    if isinstance(content, dict):
        content = json.dumps(asdict(step()) | content)
    if content is not None:
        file.write_text(content)
    assert main(["fit", f"--records=[{file}]", f"--out={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_states_of_other_records_and_too_few_prompts_are_refused(tmp_path, capsys):
    file = tmp_path / "steps.jsonl"
    steps.append(file, step())
    steps.write_hidden(file, [torch.zeros(8, 4)] * 2, "a")
    assert main(["fit", f"--records=[{file}]"]) == 2
    assert "holds states of 2 steps" in capsys.readouterr().err
    steps.write_hidden(file, [torch.zeros(8, 4)], "a")
    assert main(["fit", f"--records=[{file}]", f"--out={tmp_path / 'out'}"]) == 2
    assert "a split needs 5" in capsys.readouterr().err


def test_a_draft_that_first_reads_what_it_missed_is_not_timed():
    turns, state, drafted = InTurn(2), RoundState(0, 9, 8), []
    for _ in range(8):
        drafted.append(gamma := turns.plan(state))
        said = [Signals(j, 1.0, 0.5, 0.5) for j in range(gamma)]
        late = gamma > 0 and drafted[-2:-1] == [0]
        turns.observe(RoundOutcome(state, 0, said, list, 50.0 if late else gamma, 30.0))
    assert drafted == [1, 1, 2, 0] * 2
    assert turns.ms == [[30.0] * 2, [31.0] * 3, [32.0] * 2]


def test_records_are_never_written_over(recorded, capsys):
    assert main(["profile", f"--records={recorded / 'steps.jsonl'}"]) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    assert main(["profile", "--records=x", "--compressions=[int4]"]) == 2
    assert "compression: 'int4'" in capsys.readouterr().err
