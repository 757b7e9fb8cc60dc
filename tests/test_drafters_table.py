"""`tts drafters`: every arm commits the same path, and its row says what it cost."""

import json

import pytest

from experiments.cli import main
from experiments.drafters import _until_loop
from experiments.workload import RecordedDialogue
from tests import tiny
from tests.heads import dflash_pair, eagle3_pair
from tts.drafting import dflash_checkpoint, eagle3_checkpoint


@pytest.fixture
def folders(tmp_path):
    made = eagle3_pair(norm_before_residual=True)
    tiny.save(made.target, tmp_path / "target")
    eagle3_checkpoint.save(made.draft, tmp_path / "eagle3")
    dflash_checkpoint.save(dflash_pair().draft, tmp_path / "dflash")
    return tmp_path


def test_every_drafter_and_mode_is_a_row(folders, capsys):
    target, path = str(folders / "target"), str(folders / "path.json")
    (folders / "w.json").write_text(json.dumps([{"id": "a", "turns": ["abc", "de"]}]))
    common = ["--target", target, "--dtype", "float32", "--max_new_tokens", "40"]
    record = ["record", *common, "--draft", target, "--workload", str(folders / "w.json")]
    assert main([*record, "--out", path]) == 0
    names = [str(folders / "eagle3"), str(folders / "dflash"), "prompt_lookup"]
    arguments = [
        "drafters", *common, "--drafters", json.dumps(names), "--path", path, "--gamma", "2",
        "--results", str(folders / "results"), "--segment_tokens", "8",
        "--distill.stride", "4", "--distill.max_update_share", "1",
    ]  # fmt: skip
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = summary["arms"]
    # what only copies neither learns nor remembers; beside a head, what comes back can be copied
    assert len(rows) == 1 + 2 * (5 + 5 + 1) + 2 * 2
    assert {row["tokens"] for row in rows.values()} == {rows["target"]["tokens"]}
    for name in names[:2]:
        assert rows[f"{name}, online, fixed"]["updates"] > 0


def test_a_path_ends_where_it_begins_to_repeat_itself():
    fresh, loop = list(range(1500)), [1, 2] * 1000
    cut = _until_loop(RecordedDialogue("a", ["x", "y", "z"], 0, [fresh, loop, fresh]))
    assert cut.turns == ["x", "y"]
    assert [len(answer) for answer in cut.answers] == [1500, 500]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modes", '["never"]'], "modes: 'never'"),
        (["--policies", '["svip"]'], "policies: 'svip'"),
        (["--drafters", "[]"], "name at least one"),
        ([], "path: give a file"),
    ],
)
def test_bad_options_are_refused(arguments, says, capsys):
    assert main(["drafters", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_copies_are_for_the_mlp(capsys):
    assert main(["drafters", "--path", "x", "--modes", "[lookup]", "--policies", "[fixed]"]) != 0
    assert "the mode lookup is for the gamma MLP alone" in capsys.readouterr().err
