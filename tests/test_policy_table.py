"""`tts policies`: arms that take turns commit one text, and ratios are of their times."""

import json

import pytest

from controllers.fixed import Fixed
from controllers.or_none import FIRST, PROBE, OrNone
from experiments.cli import main
from experiments.options import SpeculationOptions
from experiments.policies import Policies, _arms, compare
from experiments.results import Results
from experiments.turns import _cut
from tests import tiny
from tts.drafting import PromptLookup
from tts.errors import UserError
from tts.policy import RoundOutcome, RoundState, Signals
from tts.records import RoundRecord

STATE = RoundState(10, 20, 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tiny.save_pair(tiny.model("llama3.1"), 0.05, tmp_path_factory.mktemp("pair"))
    talk = {"conversations": [{"id": x, "turns": ["abc", "d"]} for x in "ab"]}
    (root / "talk.json").write_text(json.dumps(talk))
    return root


def flags(models):
    return [f"--target={models / 'target'}", f"--draft={models / 'draft'}", "--dtype=float32",
            "--max-new-tokens=40"]  # fmt: skip


def test_every_arm_commits_the_path_and_is_held_to_the_best_fixed_gamma(models, tmp_path, capsys):
    path = tmp_path / "path.json"
    text = [f"--workload={models / 'talk.json'}", "--conversations=0", "--turn-tokens=21",
            f"--out={path}"]  # fmt: skip
    assert main(["record", *flags(models), *text]) == 0
    code = main([
        "policies", *flags(models), f"--paths=[{path}]", "--gammas=[0,3]", "--segment-tokens=10",
        "--arms=[gamma,svip,bandit,oracle]", "--or-none=[svip]", f"--results={tmp_path}",
        "--run-id=t", "--remember=true",
    ])  # fmt: skip
    assert code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["regimes"]["none"]
    assert list(found["arms"]) == [
        "fixed 0", "fixed 3", "gamma", "svip", "bandit", "oracle", "svip or none",
    ]  # fmt: skip
    tokens = {row["tokens"] for row in found["arms"].values()}
    assert len(tokens) == 1
    assert all(row["flips"] == 0 for row in found["arms"].values())
    assert found["arms"]["oracle"]["priced_over_oracle"] == [1.0, 1.0, 1.0]
    assert found["arms"]["fixed 0"]["acceptance_length"] == 1
    lengths = [row["acceptance_length"] for row in found["arms"].values()]
    assert found["arms"]["oracle"]["acceptance_length"] == max(lengths)
    rows = (tmp_path / "policies" / "t" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["compression"] for row in rows} == {"none"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "paths: give files"),
        (["--gammas=[]"], "gammas: none given"),
        (["--gammas=[99]"], "gamma: 99"),
        (["--arms=[draft]"], "lets the draft learn"),
        (["--arms=[window]"], "window has no policy of its own"),
        (["--segment-tokens=1"], "segment_tokens: 1"),
        (["--remember=true", "--draft=prompt_lookup"], "remember: prompt_lookup has no states"),
        (["--or-none=[clever]"], "arms: 'clever'"),
        (["--paths=[/no/path.json]"], "path: no file"),
    ],
)
def test_what_cannot_be_compared_is_refused(models, capsys, wrong, message):
    assert main(["policies", *flags(models), *wrong]) == 2
    assert message in capsys.readouterr().err


def test_all_lengths_are_compared_with_one_draft():
    config = Policies(window=7, arms=("gamma", "svip", "oracle"), or_none=("svip",))
    arms = _arms(config, tiny.pair())
    assert {arm._draft_window for arm in arms.values()} == {7}
    models = {name for name, arm in arms.items() if not isinstance(arm.pair.draft, PromptLookup)}
    assert arms.keys() - models == {"fixed 0"}, "it pays for nobody's overlap"
    assert len(arms) == len(config.gammas) + len(config.arms) + 1


def test_a_refused_start_leaves_no_folder_and_nothing_that_was_measured_goes(models, tmp_path):
    path = tmp_path / "path.json"
    text = [f"--workload={models / 'talk.json'}", f"--out={path}"]
    assert main(["record", *flags(models), *text]) == 0
    refused = [f"--paths=[{path}]", f"--results={tmp_path}", "--run-id=x", "--draft=/nowhere"]
    assert main(["policies", *flags(models), *refused]) == 2
    assert not (tmp_path / "policies" / "x").exists()
    results = Results(str(tmp_path), "policies", "y", SpeculationOptions())
    results.append("metrics.jsonl", {"arm": "a"})
    with pytest.raises(UserError), results.starting():
        raise UserError("the second regime cannot be loaded")
    results.finish({"status": "interrupted"})
    assert {f.name for f in results.folder.iterdir()} >= {"metrics.jsonl", "summary.json"}


def test_pieces_hold_every_token_and_none_is_single():
    for length in range(1, 40):
        pieces = _cut(list(range(length)), 6)
        assert [x for piece in pieces for x in piece] == list(range(length))
        assert length == 1 or min(map(len, pieces)) > 1


def rounds(drafted, ms):
    times = {"draft_ms": ms / 4, "verify_ms": ms / 2, "total_ms": ms}
    return [RoundRecord(0, 0, 9, drafted, drafted, 0, 1, None, **times)] * 4


def test_ratios_are_of_times_measured_and_at_equal_prices():
    arms = {"fixed 0": (0, 20.0), "fixed 2": (2, 10.0), "gamma": (2, 12.5), "oracle": (1, 8.0)}
    found = compare(
        {arm: {"x": rounds(*of), "y": rounds(*of)} for arm, of in arms.items()},
        ["fixed 0", "fixed 2"],
    )
    assert found["best_fixed"] == "fixed 2"
    row = found["arms"]["gamma"]
    assert row["measured_over_best_fixed"] == pytest.approx((0.8, 0.8, 0.8))
    assert row["measured_over_oracle"][0] == pytest.approx(0.64)
    assert (row["draft_share"], row["verify_share"]) == (0.25, 0.5)
    assert found["arms"]["fixed 0"]["measured_over_ours"][0] == pytest.approx(0.625)
    # rounds of two drafted tokens took 10 or 12.5 ms: at equal prices the two arms are one
    # and what a draft read late, where none was drafted, is no part of the price
    assert found["round_ms"] == pytest.approx({"0+0": 15.0, "1+0": 8.0, "2+0": 11.25})
    assert row["priced_over_best_fixed"] == pytest.approx((1.0, 1.0, 1.0))
    assert row["priced_over_oracle"][0] == pytest.approx(8 / 11.25)


@pytest.mark.parametrize("pays", [True, False])
def test_leave_not_to_draft_is_taken_where_drafting_does_not_pay(pays):
    policy, drafted = OrNone(Fixed(4)), []
    for _ in range(200):
        gamma = policy.plan(STATE)
        drafted.append(gamma)
        said = [Signals(j, 1.0, 0.5, 0.5) for j in range(gamma)]
        accepted = gamma if pays else 0
        outcome = RoundOutcome(STATE, accepted, said, list, draft_ms=3.0 * gamma, verify_ms=30.0)
        policy.observe(outcome)
    assert set(drafted[:FIRST]) == {0, 4}
    late = drafted[FIRST:]
    assert abs(late.count(4 if pays else 0) / len(late) - (1 - 2 / PROBE)) < 0.02
    other = OrNone(Fixed(4))
    other.load_state_dict(policy.state_dict())
    assert repr(other.state_dict()) == repr(policy.state_dict())


def test_a_policys_own_time_is_priced():
    slow = [RoundRecord(0, 0, 9, 2, 2, 0, 1, None, total_ms=12.5, policy_ms=2.5)] * 4
    fast = [RoundRecord(0, 0, 9, 2, 2, 0, 1, None, total_ms=10.0)] * 4
    found = compare({"fixed 2": {"x": fast}, "gamma": {"x": slow}}, ["fixed 2"])
    assert found["arms"]["gamma"]["priced_over_best_fixed"][0] == pytest.approx(0.8)
