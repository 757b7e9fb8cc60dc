"""A policy as a table: cells computed by hand, refusals in one sentence."""

import json

import pytest

from experiments.cli import main
from experiments.export import gamma_table


def row(context, drafted, accepted, conversation="a", arm="gamma"):
    return {
        "arm": arm,
        "conversation": conversation,
        "compression": "none",
        "context_length": context,
        "num_drafted": drafted,
        "num_accepted": accepted,
    }


def test_a_cell_holds_the_mean_length_at_its_context_and_recent_acceptance():
    rows = [
        row(10, 4, 2),  # nothing is known before it
        row(13, 4, 4),  # 2 / 4
        row(300, 6, 0),  # 6 / 8
        row(301, 0, 0),  # 6 / 14
        row(302, 1, 1),  # 6 / 14: a round without drafts says nothing
        row(20, 8, 8, "b"),  # another conversation
    ]
    table = gamma_table(rows, (0, 256))
    assert table["gamma"][0][5] == 4
    assert table["gamma"][1][7] == 6
    assert table["gamma"][1][4] == round(0.5)
    assert table["rounds"][1][4] == 2
    assert sum(map(sum, table["rounds"])) == 4
    assert table["gamma"][0][0] is None


def test_export_writes_the_table_of_an_arm(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(10 * i, 3, 1)) + "\n"
                                                    for i in range(20)))  # fmt: skip
    out = tmp_path / "table.json"
    flags = ["export", f"--run={tmp_path}"]
    assert main([*flags, f"--out={out}"]) == 0
    assert json.loads(out.read_text())["gamma"][0][3] == 3
    capsys.readouterr()
    for wrong, message in (
        ([f"--out={out}"], "exists"),
        ([f"--out={tmp_path / 'x'}", "--arm=svip"], "arm: 'svip' is not in this run"),
        ([f"--out={tmp_path / 'x'}", "--compression=nf4"], "no round of 'nf4'"),
        ([f"--out={tmp_path / 'x'}", "--contexts=[5,1]"], "contexts"),
        ([f"--out={tmp_path / 'x'}", "--run=/no"], "run: no file"),
    ):
        assert main([*flags, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends_of_the_scale_have_cells(rate):
    table = gamma_table([row(10, 4, int(4 * rate))] * 3, (0,))
    assert table["gamma"][0][-1 if rate else 0] == 4
