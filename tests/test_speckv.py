"""SpecKV's figures come out of its records, and records that are broken are refused."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from experiments.speckv import COMPRESSIONS, GAMMAS, RUNS, SIGNALS, STEPS

RECORDS = Path(os.environ.get("TTS_SPECKV", Path(__file__).parents[2] / "shared/data/speckv"))


def call(folder, capsys):
    code = main(["speckv", f"--records={folder}"])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.skipif(not (RECORDS / STEPS).exists(), reason="SpecKV's records are not here")
def test_the_published_figures_and_the_measured_ones(capsys):
    code, out, _ = call(RECORDS, capsys)
    assert code == 0
    summary = json.loads(out.strip().splitlines()[-1])
    published, honest = summary["published"], summary["honest"]
    assert published["fixed_4"] == pytest.approx(3.73, rel=0.02)
    assert published["speckv"] == pytest.approx(5.82, rel=0.02)
    assert published["gain"] == pytest.approx(0.560, rel=0.02)
    assert published["correlation"] == pytest.approx(0.685, abs=0.02)
    assert honest["fixed_4"] == pytest.approx(3.763, abs=5e-4)
    assert honest["fixed_8"] == pytest.approx(5.235, abs=5e-4)
    assert honest["correlation"] < 0.5
    assert honest["p"] > 0.05
    fastest = {name: of["fastest_gamma"] for name, of in summary["cost"].items()}
    assert fastest == {"fp16": 2, "int8": 8, "nf4": 4}


def write(folder, change=lambda rows: rows):
    """Small records of the authors' form: two prompts a task, acceptance by a fixed hazard."""
    random = np.random.default_rng(0)
    steps, runs = [], []
    for compression in COMPRESSIONS:
        for gamma in GAMMAS:
            for task in ("code", "chat"):
                for prompt in range(5):
                    for step in range(4):
                        accepted = min(gamma, int(random.geometric(0.3)) - 1)
                        said = dict(zip(SIGNALS, random.random(4).round(4), strict=True))
                        steps.append(
                            {"compression": compression, "gamma": gamma, "task": task, "step": step,
                             "accepted": accepted, "acceptance_rate": accepted / gamma,
                             "tokens_produced": accepted + 1, **said}
                        )  # fmt: skip
                    runs.append(
                        {"compression": compression, "gamma": gamma, "task": task,
                         "prompt": prompt, "num_tokens": 12, "num_steps": 4,
                         "elapsed_sec": 4 * (0.03 + 0.01 * gamma)}
                    )  # fmt: skip
    folder.mkdir()
    for name, rows in ((STEPS, change(steps)), (RUNS, runs)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def test_costs_come_out_of_the_timings(tmp_path, capsys):
    code, out, _ = call(write(tmp_path / "made"), capsys)
    assert code == 0
    cost = json.loads(out.strip().splitlines()[-1])["cost"]["nf4"]
    assert cost["c"] == pytest.approx(1 / 3)
    assert cost["step_s"]["8"] == pytest.approx(0.11)


def without(column):
    return lambda rows: [{k: v for k, v in row.items() if k != column} for row in rows]


def with_value(column, value):
    return lambda rows: [rows[0] | {column: value}, *rows[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("min_draft_confidence"), "no column min_draft_confidence"),
        (without("task"), "no column task"),
        (with_value("mean_draft_entropy", "nan"), "holds NaN"),
        (with_value("acceptance_rate", "much"), "holds no number"),
        (with_value("compression", "int3"), "compression 'int3' is not one of"),
    ],
)
def test_broken_records_are_one_sentence(tmp_path, capsys, change, message):
    code, _, err = call(write(tmp_path / "made", change), capsys)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_records_that_are_not_there_or_empty(tmp_path, capsys):
    code, _, err = call(tmp_path, capsys)
    assert (code, err.count("\n")) == (2, 1)
    folder = write(tmp_path / "made")
    (folder / STEPS).write_text("compression,gamma\n")
    code, _, err = call(folder, capsys)
    assert code == 2
    assert "is empty" in err
