"""The command line on a tiny pair: results, errors in one sentence, interruptions."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml

from controllers import make_policy
from experiments import bench as bench_module
from experiments import trackers
from experiments.arms import build
from experiments.cli import VERBS, main
from experiments.compare import _table, read
from experiments.curves import (
    acceptance_curve,
    ahead_from,
    interval,
    known,
    overlap_curve,
    quotient,
    ratio_interval,
    seconds_curve,
    third_edges,
    worst,
)
from experiments.distill_offline import DRAFTERS
from experiments.options import SpeculationOptions, TextOptions
from experiments.results import Results
from experiments.workload import FOLDER, Dialogue, PathFile, dialogues
from tests import tiny
from tests.test_engine import PROMPT, decode, greedy
from tts.acceptance import Block
from tts.distill.config import DistillConfig
from tts.drafting import make_drafter
from tts.errors import UserError
from tts.metrics import (
    acceptance_rate_per_offset,
    distinct_4,
    distinct_4_windows,
    summarise,
)
from tts.models import load_pair
from tts.records import RoundRecord


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tiny.save_pair(tiny.model("llama3.1"), 0.1, tmp_path_factory.mktemp("pair"))
    (root / "talk.json").write_text(
        json.dumps({"conversations": [{"id": "a", "turns": ["abc", "d", "ef"]},
                                      {"id": "b", "turns": ["xyz", "w"]}]})
    )  # fmt: skip
    return root


@pytest.fixture
def tts(models, tmp_path, capsys):
    """Run a verb on the tiny pair; returns (exit code, stdout, stderr)."""

    def call(verb, *flags, text=True):
        common = [f"--target={models / 'target'}", f"--draft={models / 'draft'}", "--dtype=float32"]
        if text:
            common += [f"--workload={models / 'talk.json'}", "--max-new-tokens=40",
                       "--turn-tokens=20", "--conversations=0"]  # fmt: skip
        if verb == "run":
            common += [f"--results={tmp_path / 'results'}", "--wandb=disabled"]
        code = main([verb, *common, *flags])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_published_policies_are_arms_on_the_same_text(tts):
    code, out, _ = tts("run", "--arms=[static,svip,confidence,bandit,oracle]")
    assert code == 0
    arms = json.loads(out.strip().splitlines()[-1])["arms"]
    assert list(arms) == ["static", "svip", "confidence", "bandit", "oracle"]
    assert len({arm["num_emitted_tokens"] for arm in arms.values()}) == 1
    assert len({arm["num_draft_tokens"] for arm in arms.values()}) > 1


def test_every_arm_but_static_and_draft_reads_the_newest_positions_only():
    pair, options = tiny.pair("llama3.1"), SpeculationOptions(window=8)
    names = ("static", "draft", "window", "draft_window", "memory", "gamma", "both", "lookup")
    policy = make_policy("fixed")
    reads = {name: build(name, pair, options, policy)._draft_window for name in names}
    assert reads == dict.fromkeys(names, 8) | {"static": None, "draft": None}


def test_a_run_writes_everything_and_runs_again_from_its_config(tts, tmp_path):
    code, out, _ = tts(
        "run", "--arms=[static,window,target]", "--run-id=one", "--window=8", "--wandb=offline"
    )
    assert code == 0
    folder = tmp_path / "results" / "run" / "one"
    last = json.loads(out.strip().splitlines()[-1])
    assert last["status"] == "finished"
    assert {f.name for f in folder.iterdir()} == {
        "config.yaml", "command.txt", "metrics.jsonl", "samples.jsonl", "summary.json",
        "acceptance_vs_position.png", "acceptance_vs_position.pdf", "wandb",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    texts = {}
    for row in rows:
        texts.setdefault((row["arm"], row["conversation"]), []).extend(row["overlap_position"])
    assert len(texts) == 6
    assert all(sorted(positions) == list(range(40)) for positions in texts.values())
    samples = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    for name in ("a", "b"):
        written = {s["turns"][0]["assistant"] for s in samples if s["conversation"] == name}
        assert len(written) == 1, "arms on one path write one text"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["arms"]["static"]["path_mismatches"] == 0
    assert summary["arms"]["static"]["num_emitted_tokens"] == 80

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["arms"] == ["static", "window", "target"]
    code, _, _ = tts("run", f"--config={folder / 'config.yaml'}", "--run-id=two")
    assert code == 0
    again = json.loads((tmp_path / "results" / "run" / "two" / "summary.json").read_text())
    counts = ("num_spec_steps", "num_accepted_draft_tokens", "num_emitted_tokens")
    for arm, values in summary["arms"].items():
        assert [again["arms"][arm][c] for c in counts] == [values[c] for c in counts]


def test_a_finished_run_id_is_a_no_op_and_another_folder_an_error(tts, tmp_path):
    assert tts("run", "--run-id=x")[0] == 0
    metrics = (tmp_path / "results" / "run" / "x" / "metrics.jsonl").read_text()
    code, _, err = tts("run", "--run-id=x")
    assert code == 0
    assert "finished with the same config" in err
    assert (tmp_path / "results" / "run" / "x" / "metrics.jsonl").read_text() == metrics
    code, _, err = tts("run", "--run-id=x", "--gamma=2")
    assert code == 2
    assert err.startswith("tts: run_id: ")


def test_a_recorded_path_is_what_later_runs_commit(tts, tmp_path):
    path = tmp_path / "path.json"
    code, out, _ = tts("record", f"--out={path}")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["tokens"] == 80
    recorded = PathFile.read(str(path))
    assert [d.id for d in recorded.dialogues] == ["a", "b"]
    code, _, _ = tts("run", f"--path={path}", "--arms=[static,target]", "--run-id=p")
    assert code == 0
    summary = json.loads((tmp_path / "results" / "run" / "p" / "summary.json").read_text())
    assert [a["path_mismatches"] for a in summary["arms"].values()] == [0, 0]
    code, _, err = tts("run", f"--path={path}", "--temperature=0.5")
    assert (code, err.count("\n")) == (2, 1)
    assert "temperature: 0.5 is not the 0.8" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload=/no/file.json"], "workload: no file"),
        (["--workload={empty}"], "empty"),
        (["--workload={broken}"], "not JSON"),
        (["--workload={shapeless}"], '"turns"'),
        (["--policy=clever"], "policy: 'clever' is not one of"),
        (["--temperature=-1"], "temperature: -1"),
        (["--gamma=-1"], "gamma: -1 is outside"),
        (["--gamma=99"], "gamma: 99 is outside"),
        (["--acceptance=maybe"], "acceptance: 'maybe'"),
        (["--arms=[static,static]"], "names one twice"),
        (["--arms=[other]"], "arms: 'other'"),
        (["--window=0"], "window: 0"),
        (["--lookup=0"], "lookup: a match of 0 to 8 tokens is none"),
        (["--wandb=perhaps"], "wandb: 'perhaps'"),
        (["--draft=prompt_lookup"], "arms: draft needs a draft that learns"),
        (["--draft=prompt_lookup", "--arms=[memory]"], "memory reads the draft's states"),
        (["--memory.capacity=0"], "memory.capacity: 0"),
        (["--draft=prompt_lookup", "--arms=[specdecpp]"], "specdecpp reads the draft's states"),
        (["--arms=[oracle,static]"], "oracle needs it in advance"),
        (["--arms=[static,specdecpp]"], "trained for another draft"),
        (["--policy=speckv", "--weights=."], "holds no SpecKV regressor"),
        (["--compression=int4"], "compression: 'int4'"),
        (["--workload={long}"], "context"),
        (["--gamme=3"], "gamme"),
        (["--gamma=three"], "gamma"),
        (["--results={file}/x"], "cannot be written"),
        (["--path={broken}"], "not a recorded path"),
        (["--path={cut}"], "a: 2 turns, 1 answers"),
        (["--draft=/nowhere/at/all"], "draft: no folder"),
        (["--path={path}", "--seed=3"], "seed: 3 is not the 0"),
        (["--path={no_answer}"], "a dialogue or an answer is empty"),
        (["--path={words}"], "no whole number"),
        (["--workload={twice}"], "2 conversations are called 'x'"),
        (["--workload={binary}"], "not text in UTF-8"),
        (["--workload={numbers}"], '"turns"'),
        (["--workload={seeds}"], "seed 'y'"),
        (["--acceptance=block"], "use coupled, or one arm"),
        (["--acceptance=greedy", "--arms=[target]"], "set that, or use another rule"),
        (["--weights=/nowhere"], "weights: no folder"),
        (["--run-id=../x"], "run_id: '../x'"),
        (["--arms=static"], "write a list"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(tts, tmp_path, flags, message):
    files = {"empty": "", "broken": "{", "shapeless": '{"conversations": [{"id": 1}]}',
             "long": json.dumps({"turns": ["a" * 600]}), "file": "x",
             "cut": json.dumps({"dialogues": [
                 {"id": "a", "turns": ["b", "c"], "seed": 0, "answers": [[1]]}]}),
             "path": path_of([[1]]), "no_answer": path_of([[]]), "words": path_of([["b"]]),
             "twice": '{"id": "x", "turns": ["b"]}\n{"id": "x", "turns": ["c"]}',
             "numbers": '{"turns": [3]}', "seeds": '{"turns": ["b"], "seed": "y"}',
             "binary": b"\xff"}  # fmt: skip
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    flags = [flag.format(**{name: tmp_path / name for name in files}) for flag in flags]
    code, _, err = tts("run", *flags)
    assert code == 2
    assert err.startswith("tts: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_questions_of_spec_bench_are_a_workload(tmp_path):
    lines = [{"question_id": 81, "category": "writing", "turns": ["a", "b"]}, {"turns": ["c"]}]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = dialogues(TextOptions(workload=str(tmp_path / "question.jsonl"), conversations=0))
    assert found == [Dialogue("81", ["a", "b"], 0), Dialogue("1", ["c"], 1)]


def path_of(answers):
    """A path file of one dialogue, as `tts record` writes it."""
    dialogue = {"id": "a", "turns": ["b"], "seed": 0, "answers": answers}
    return json.dumps({
        "target": "t", "dtype": "float32", "temperature": 0.8, "top_p": 0.95, "top_k": 0,
        "repetition_penalty": 1.0, "dialogues": [dialogue],
    })  # fmt: skip


def test_a_run_id_is_not_used_up_by_a_mistake(tts, tmp_path):
    assert tts("run", "--run-id=again", "--arms=[static]", "--draft=/nowhere")[0] == 2
    assert tts("run", "--run-id=again", "--arms=[static]")[0] == 0


def test_an_interrupted_recording_keeps_its_answers(tts, tmp_path, monkeypatch):
    import experiments.decode
    import experiments.record

    def interrupted(decoder, dialogue, text, on_round, done):
        def stop(turn, record):
            if turn == 1:
                raise KeyboardInterrupt

        return experiments.decode.decode(decoder, dialogue, text, stop, done)

    monkeypatch.setattr(experiments.record, "decode", interrupted)
    code, _, _ = tts("record", f"--out={tmp_path / 'p.json'}", "--turn-tokens=8")
    assert code == 130
    (dialogue,) = PathFile.read(str(tmp_path / "p.json")).dialogues
    assert [len(answer) for answer in dialogue.answers] == [8]


def test_an_interruption_keeps_what_was_measured_and_exits_with_130(tts, tmp_path, monkeypatch):
    import experiments.run

    honest, calls = experiments.run.decode, []

    def interrupted(decoder, dialogue, text, on_round):
        calls.append(dialogue)
        if len(calls) < 2:
            return honest(decoder, dialogue, text, on_round)

        def stop(turn, record):
            on_round(turn, record)
            if record.position > 10:
                raise KeyboardInterrupt

        return honest(decoder, dialogue, text, stop)

    monkeypatch.setattr(experiments.run, "decode", interrupted)
    code, _, err = tts("run", "--run-id=cut", "--arms=[static,target]")
    assert code == 130
    assert "interrupted" in err
    folder = tmp_path / "results" / "run" / "cut"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["arms"]["static"]["num_emitted_tokens"] == 40
    assert 10 < summary["arms"]["target"]["num_emitted_tokens"] < 40
    assert (folder / "acceptance_vs_position.png").is_file()


def test_bench_times_ours_and_transformers_own(tts, tmp_path, monkeypatch):
    path, judged, judge = tmp_path / "path.json", [], Block.judge
    monkeypatch.setattr(Block, "judge", lambda *args: judged.append(1) or judge(*args))
    tts("record", f"--out={path}")
    code, out, _ = tts(
        "bench", f"--path={path}", "--segments=2", "--segment-tokens=12", "--gammas=[0,2]",
        "--lengths=[2]", "--learning-gamma=2", f"--results={tmp_path}", "--run-id=b", text=False,
    )  # fmt: skip
    assert code == 0
    medians = json.loads(out.splitlines()[-1])["tok_s_median"]
    assert set(medians) == {
        "ours, gamma 0", "ours, gamma 2", "ours, gamma MLP", "ours, gamma MLP and draft learn",
        "ours, gamma MLP, lookup", "ours, gamma MLP and draft learn, lookup",
        "ours, gamma MLP, memory", "ours, gamma MLP, memory, lookup",
        "ours, gamma MLP and draft learn, memory, lookup", "ours, gamma 2, memory",
        "ours, gamma 2, draft learns", "transformers, plain", "transformers, plain, our kernels",
        "transformers, assisted, default", "transformers, assisted, constant 2",
        "transformers, assisted, heuristic", "transformers, prompt lookup",
    }  # fmt: skip
    assert all(value > 0 for value in medians.values())
    assert judged
    code, _, err = tts("bench", f"--path={path}", "--acceptance=maybe", text=False)
    assert code != 0
    assert "acceptance: 'maybe'" in err


def test_profile_prints_costs_beside_the_floor(tts):
    code, out, _ = tts("profile", "--contexts=[20,200]", "--rows=[1,3]", "--repeats=3", text=False)
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    assert summary["bandwidth_gb_s"] > 0
    assert set(summary["context_cost"]["ratio"]) == {"1", "3"}


def test_the_four_arms_share_one_text_and_show_their_updates(tts, tmp_path):
    code, out, _ = tts(
        "run", "--arms=[static,draft,gamma,both,lookup_both,memory_both]", "--run-id=four",
        "--distill.stride=4", "--distill.max-update-share=1", "--distill.window=4",
        "--distill.rank=2",
    )  # fmt: skip
    assert code == 0
    last = json.loads(out.strip().splitlines()[-1])
    assert last["arms"]["draft"]["num_updates"] > 0
    assert last["arms"]["static"]["num_updates"] == last["arms"]["gamma"]["num_updates"] == 0
    assert {arm["path_mismatches"] for arm in last["arms"].values()} == {0}
    assert set(last["ahead_of_static_from"]) == {
        f"{text}/{arm}"
        for text in "ab"
        for arm in ("draft", "gamma", "both", "lookup_both", "memory_both")
    }
    rows = (tmp_path / "results" / "run" / "four" / "metrics.jsonl").read_text().splitlines()
    updates = [row for row in map(json.loads, rows) if row["update"]]
    assert {row["arm"] for row in updates} <= {"draft", "both", "lookup_both", "memory_both"}
    code, out, _ = tts("run", "--arms=[draft,both]", "--run-id=off", "--no-draft-updates")
    assert code == 0
    arms = json.loads(out.strip().splitlines()[-1])["arms"]
    assert all(arm["num_updates"] == 0 for arm in arms.values())


@pytest.mark.parametrize("scope", ["sequence", "session"])
def test_what_a_draft_learned_in_one_conversation_goes_on_in_the_next(tts, tmp_path, scope):
    code, _, _ = tts(
        "run", "--arms=[draft]", "--run-id=s", f"--distill.scope={scope}", "--distill.stride=4",
        "--distill.max-update-share=1", "--distill.window=4", "--distill.rank=2",
    )  # fmt: skip
    assert code == 0
    rows = (tmp_path / "results" / "run" / "s" / "metrics.jsonl").read_text().splitlines()
    begin = {row["conversation"]: row["adapted"] for row in map(json.loads, reversed(rows))}
    assert begin == {"a": False, "b": scope == "session"}
    on = ["run", "--arms=[draft]", f"--learned={tmp_path / 'results' / 'run' / 's'}"]
    code, _, err = tts(*on, "--run-id=t", f"--distill.scope={scope}", "--distill.rank=2")
    assert (code, "forgets at once" in err) == ((0, False) if scope == "session" else (2, True))
    if code == 0:
        rows = (tmp_path / "results" / "run" / "t" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[0])["adapted"]
    for arm, says in (("gamma", "cannot read"), ("static", "none of these arms learns")):
        code, _, err = tts("run", "--learned=/nowhere", f"--arms=[{arm}]")
        assert code == 2
        assert says in err


def test_recorded_answers_are_committed_whole(tts, tmp_path):
    path = tmp_path / "long.json"
    assert tts("record", f"--out={path}", "--turn-tokens=35")[0] == 0
    recorded = [len(answer) for d in PathFile.read(str(path)).dialogues for answer in d.answers]
    assert max(recorded) > 20, "or the runs' own limit of 20 could cut nothing"
    code, out, _ = tts("run", f"--path={path}", "--arms=[static]")
    assert code == 0
    static = json.loads(out.splitlines()[-1])["arms"]["static"]
    assert static["num_emitted_tokens"] == sum(recorded)


def test_compare_joins_runs_and_leaves_out_what_not_every_arm_finished(tts, tmp_path, capsys):
    assert tts("run", "--arms=[static,target]", "--run-id=a", "--conversations=1")[0] == 0
    assert tts("run", "--arms=[static,target]", "--run-id=b")[0] == 0
    folders = [tmp_path / "results" / "run" / name for name in "ab"]
    records = folders[1] / "metrics.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:-1]))
    figure = tmp_path / "docs" / "joined.png"
    runs = "--runs=[" + ",".join(map(str, folders)) + "]"
    assert main(["compare", runs, f"--out={figure}"]) == 0
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(summary["overlap"]) == {"a"}, "the second conversation was cut short in one arm"
    assert set(summary["overlap"]["a"]) == {"static", "target"}
    assert len(summary["acceptance_length"]["a"]["static"]) == 4
    assert figure.is_file()
    assert main(["compare", runs, f"--out={figure}", "--curves=[gamma,seconds]", "--bin=20"]) == 0
    assert main(["compare", runs, "--curves=[speed]"]) == 2
    assert main(["compare"]) == 2
    assert main(["compare", f"--runs=[{tmp_path}]"]) == 2


def test_sweep_replays_a_path_under_every_setting(tts, models, tmp_path):
    path = tmp_path / "path.json"
    assert tts("record", f"--out={path}")[0] == 0
    code, out, _ = tts(
        "sweep", f"--path={path}", "--distill.stride=5", "--distill.window=5",
        '--vary={"loss": ["overlap", "jsd"], "rank": [2, 4]}', f"--out={tmp_path / 'log.jsonl'}",
        text=False,
    )  # fmt: skip
    assert code == 0
    settings = json.loads(out.strip().splitlines()[-1])["settings"]
    assert [s["vary"] for s in settings] == [
        {"loss": loss, "rank": rank} for loss in ("overlap", "jsd") for rank in (2, 4)
    ]
    static = settings[0]["thirds"]["a"]["static"]
    assert settings[0]["thirds"]["a"]["online"] != static
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    code, out, _ = tts(
        "sweep", f"--path={path}", "--no-draft-updates", '--vary={"memory.prior": [1e9, 0.01]}',
        text=False,
    )  # fmt: skip
    deaf, heard = json.loads(out.strip().splitlines()[-1])["settings"]
    assert deaf["distill"] is None
    assert deaf["thirds"]["a"]["online"] == pytest.approx(static, abs=1e-3)
    assert heard["thirds"]["a"]["online"] != pytest.approx(static, abs=1e-2)
    code, _, err = tts("sweep", f"--path={path}", "--compression=int8", text=False)
    assert (code, "compression: int8 is not the none" in err) == (2, True)
    for field in ("speed", "memory.speed"):
        code, _, err = tts("sweep", f"--path={path}", f'--vary={{"{field}": [1]}}', text=False)
        assert code == 2
        assert "vary" in err


def test_every_verb_has_help_and_none_needs_a_model_for_it(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        assert "--" in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert main([]) == 2


def test_the_console_script_prints_one_sentence_for_a_mistake(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", "run", "--policy", "x"],
        capture_output=True, text=True, env=os.environ | {"TTS_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("tts: policy: 'x'")


def test_a_tracker_that_fails_is_left_out():
    class Broken:
        def log(self, values):
            raise OSError("disk full")

        def close(self):
            raise OSError

    safe = trackers.Safe(Broken())
    safe.log({"a": 1})
    safe.log({"a": 2})
    safe.close()
    with pytest.raises(UserError):
        trackers.make_tracker("sometimes", "n", ".", {})


def rounds():
    """Two rounds of gamma 4: all accepted, then one of four."""
    common = {"context_length": 9, "gamma": 4, "num_drafted": 4, "stop_reason": None}
    return [
        RoundRecord(0, 0, num_accepted=4, num_emitted=5, overlap=[0.9, 0.8, 0.7, 0.6],
                    overlap_position=[0, 1, 2, 3], total_ms=50, **common),
        RoundRecord(1, 5, num_accepted=1, num_emitted=2, overlap=[0.5, 0.4, 0.2],
                    overlap_position=[4, 5, 6], total_ms=50, **common),
    ]  # fmt: skip


def test_metrics_by_hand():
    s = summarise(rounds())
    assert s.mean_acceptance_length == pytest.approx(1 + 5 / 2)
    assert s.draft_acceptance_rate == pytest.approx(5 / 8)
    assert s.acceptance_rate_per_offset == pytest.approx([1, 0.5, 0.5, 0.5])
    assert s.acceptance_histogram == [0, 1, 0, 0, 1]
    assert s.mean_overlap == pytest.approx(4.1 / 7)
    assert s.tok_s == pytest.approx(7 / 0.1)
    empty = summarise([])
    assert empty.mean_acceptance_length is None
    assert empty.tok_s is None


def test_distinct_4_by_hand_and_a_loop_is_low():
    assert distinct_4([1, 2, 3, 4, 5]) == 1
    assert distinct_4([1, 2, 3]) is None
    assert distinct_4([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(4 / 9)
    assert distinct_4_windows([1, 2] * 1000) == [pytest.approx(2 / 997)] * 2


def test_curves_put_positions_and_rounds_into_their_bins():
    assert overlap_curve(rounds(), [0, 4, 8]).value == pytest.approx([0.75, 1.1 / 3])
    assert acceptance_curve(rounds(), [0, 4, 8]).value == pytest.approx([5, 2])
    assert third_edges(3000) == [0, 1000, 2000, 3000]


def record(position, drafted, accepted, emitted, **more):
    return RoundRecord(0, position, 9, drafted, drafted, accepted, emitted, None, **more)


def test_rounds_that_did_not_draft_so_far_say_nothing_of_an_offset():
    rows = [record(0, 4, 4, 5), record(5, 1, 0, 1), record(6, 0, 0, 1)]
    assert acceptance_rate_per_offset(rows) == [0.5, 1, 1, 1]


def test_the_adapted_share_is_of_tokens():
    rows = [record(0, 4, 2, 3), record(3, 0, 0, 1, adapted=True)]
    assert summarise(rows).adapted_share == 0.25


def test_an_arm_is_ahead_from_where_it_stays_ahead():
    def rounds(*ms):
        return [record(10 * i, 0, 0, 10, total_ms=x) for i, x in enumerate(ms)]

    edges, static = [0, 10, 20, 30, 40], rounds(100, 100, 100, 100)
    assert seconds_curve(static, edges).value == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert ahead_from(static, rounds(120, 70, 70, 70), edges) == 20
    assert ahead_from(static, rounds(90, 120, 70, 70), edges) == 30
    assert ahead_from(static, rounds(90, 70, 70, 180), edges) is None
    assert ahead_from(static, rounds(90, 70, 70, 70), [0, 250]) == 40  # not beyond the output


def test_ratios_are_over_the_first_arm():
    made = {
        name: {"static": [1.0] * 4, "draft": [ratio] * 4}
        for name, ratio in (("a", 2.0), ("b", 4.0))
    }
    cells = list(_table("overlap", made, ["static", "draft"]).columns[2].cells)
    assert all(cell.startswith("3.000 [") and cell.endswith("worst 2.000") for cell in cells[-2:])


def test_a_conversation_of_two_runs_is_that_of_the_first(tmp_path):
    for name, ms in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        row = asdict(record(0, 0, 0, 10, total_ms=ms)) | {"arm": "static", "conversation": "a"}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    arms = read([str(tmp_path / "one"), str(tmp_path / "two")])
    assert arms["static"]["a"][0].total_ms == 1.0


def test_an_unfinished_run_is_not_taken_for_done(tmp_path):
    config = DistillConfig()
    Results(str(tmp_path), "run", "x", config).finish({"status": "interrupted"})
    with pytest.raises(UserError, match="unfinished"):
        Results(str(tmp_path), "run", "x", config)


def test_speed_is_of_the_tokens_after_the_prefill(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: next(times))
    clock = bench_module.Clock()
    for count in (50, 1, 3, 3):
        clock.put(torch.zeros(count))
    monkeypatch.undo()
    assert clock.tokens_per_second == 3.0


def test_arms_take_turns_at_going_first_and_write_equally_many(tmp_path, monkeypatch):
    calls = []

    def arm(name):
        def run(prompt, config, seed, clock):
            calls.append((name, seed, config.min_new_tokens, config.max_new_tokens))
            for count in (4, 1, 2):
                clock.put(torch.zeros(count))

        return run

    monkeypatch.setattr(bench_module.Bench, "load", lambda *_: None)
    monkeypatch.setattr(bench_module, "_prompts", lambda *_: [torch.zeros(1, 4)] * 3)
    monkeypatch.setattr(bench_module, "_arms", lambda *_: {name: arm(name) for name in "abc"})
    path = str(FOLDER / "paths" / "judge.json")
    bench_module.bench(bench_module.Bench(
        path=path, segments=3, segment_tokens=7, results=str(tmp_path), run_id="r"
    ))  # fmt: skip
    timed = calls[3:]  # after the warm-up
    assert "".join(name for name, *_ in timed) == "abcbcacab"
    assert {tuple(lengths) for _, _, *lengths in timed} == {(7, 7)}
    assert [seed for _, seed, *_ in timed] == [0] * 3 + [1] * 3 + [2] * 3


def test_intervals_are_over_conversations():
    values = np.random.default_rng(1).normal(size=200)
    mean, low, high = interval(values.tolist())
    error = values.std() / 200**0.5  # of 95 %
    assert (high - mean) / error == pytest.approx(1.96, rel=0.08)
    assert (mean - low) / error == pytest.approx(1.96, rel=0.08)
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert 1.4 < low < 2.5 < high < 3.6
    assert interval([5.0])[1] != interval([5.0])[1]  # nan: one conversation has no interval


def test_ratios_are_of_sums_and_paired():
    fast, slow = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])
    assert ratio_interval(slow, fast) == (2.0, 2.0, 2.0)  # paired: every resample has it
    value, low, high = ratio_interval(np.array([2.0, 2.0, 6.0]), fast)
    assert value == pytest.approx(10 / 6)
    assert low < value < high
    assert known(ratio_interval(slow[:1], fast[:1])) == [2.0, None, None]
    assert np.isnan(quotient(1.0, 0.0))
    assert worst([float("nan"), 2.0, 1.0]) == 1.0


def test_the_shipped_workload_is_split_evenly_and_has_no_turn_twice():
    found = json.loads((FOLDER / "conversations.json").read_text())["conversations"]
    assert [c["split"] for c in found] == ["tune"] * 6 + ["judge"] * 6
    turns = [turn for c in found for turn in c["turns"]]
    assert len(set(turns)) == len(turns)
    assert min(len(c["turns"]) for c in found) >= 20


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """Flags of `tts distill-offline` for text that the tiny target wrote."""
    root = tmp_path_factory.mktemp("selftext")
    sizes = ["--text.length=32", "--text.max-user=4", "--text.max-answer=8", "--text.batch-size=4"]
    for name, sequences in (("train", 12), ("held", 4)):
        sequences = f"--text.sequences={sequences}"
        flags = [f"--target={models / 'target'}", f"--out={root / name}", sequences, *sizes]
        assert main(["selftext", *flags]) == 0
    return [
        f"--target={models / 'target'}",
        f"--corpus=[{root / 'train'}]",
        f"--held-out={root / 'held'}",
        "--training.layers=[0]",
        "--training.batch-size=4",
        "--training.visits=512",
        "--training.every=2",
        "--training.mask-token-id=62",
    ]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_drafter_is_trained_and_then_drafts(drafter, written, models, tmp_path, capsys):
    flags = [f"--drafter={drafter}", f"--out={tmp_path / 'draft'}", *written]
    assert main(["distill-offline", *flags]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["step"] == 4
    assert 0 < report["overlap"] <= 1 <= report["acceptance_length"]
    pair = load_pair(str(models / "target"), report["out"], dtype="float32")
    expected = pair.target.generate(PROMPT, generation_config=greedy(40), do_sample=False)
    result = decode(pair, 3, greedy(40))
    assert result.sequences.tolist() == expected.tolist()
    assert type(make_drafter(pair.draft, 64)).__name__.lower() == f"{drafter}drafter"


def test_a_mask_outside_the_vocabulary_is_refused(written, tmp_path, capsys):
    flags = [*written[:-1], "--drafter=pard", f"--out={tmp_path}", "--training.mask-token-id=64"]
    assert main(["distill-offline", *flags]) == 2
    assert "mask_token_id: 64 is outside the vocabulary of 64" in capsys.readouterr().err


def test_more_neurons_than_the_target_has_are_refused(written, tmp_path, capsys):
    flags = [*written[:-1], "--drafter=dflash", f"--out={tmp_path}", "--training.neurons=65"]
    assert main(["distill-offline", *flags, "--training.mask-token-id=62"]) == 2
    assert "neurons: 65 is more than the target's 64" in capsys.readouterr().err


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_training_goes_on_from_a_trained_draft(drafter, written, tmp_path, capsys):
    def trained(out, *more):
        flags = [f"--drafter={drafter}", f"--out={tmp_path / out}", *written, *more]
        assert main(["distill-offline", *flags]) == 0
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])["overlap"]

    still = "--training.learning-rate=1e-12"
    first = trained("first", "--training.learning-rate=0.05")
    assert trained("on", f"--start={tmp_path / 'first'}", still) == pytest.approx(first, abs=6e-3)
    assert trained("new", still) != pytest.approx(first, abs=0.01)


@pytest.mark.parametrize(
    ("drafter", "start", "says"),
    [
        ("dflash", "eagle3", "is eagle3, not dflash"),
        ("autoregressive", "target", "does not predict with rows of the target's head"),
    ],
)
def test_a_start_of_another_kind_is_refused(
    drafter, start, says, written, models, tmp_path, capsys
):
    flags = [f"--drafter={start}", f"--out={tmp_path / start}", *written]
    folder = models / "target" if start == "target" else tmp_path / start
    if start != "target":
        assert main(["distill-offline", *flags]) == 0
    flags = [f"--drafter={drafter}", f"--start={folder}", f"--out={tmp_path / 'out'}", *written]
    assert main(["distill-offline", *flags]) == 2
    assert says in capsys.readouterr().err
