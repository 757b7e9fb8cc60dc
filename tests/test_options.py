"""Every option that a verb offers is read by it: none does nothing."""

import dataclasses
import importlib
import json
import sys

import pytest

from experiments.cli import VERBS, main
from tests import tiny

TEXT = ["--max-new-tokens=24", "--turn-tokens=16", "--conversations=0"]
LEARN = ["--distill.stride=4", "--distill.window=4", "--distill.max-update-share=1"]
# what takes every branch of a verb that asks for an option, on the tiny pair
RUNS = {
    "record": [[*TEXT, "--workload={talk}", "--policy=mlp", "--out={out}"]],
    "run": [
        [*TEXT, *LEARN, "--workload={talk}", "--arms=[static,draft,gamma,lookup,memory]",
         "--run-id=x"],
        ["--path={path}", "--arms=[gamma]", "--max-new-tokens=24", "--learned={results}/run/x"],
    ],
    "bench": [
        ["--path={path}", "--segments=1", "--segment-tokens=6", "--gammas=[0,1]", "--lengths=[1]"]
    ],
    "policies": [
        ["--paths=[{path}]", "--max-new-tokens=24", "--arms=[gamma,lookup,memory_gamma]",
         "--gammas=[1]", "--or-none=[]"],
    ],
    "drafters": [
        ["--path={path}", "--max-new-tokens=24", "--drafters=[{draft}]", "--segment-tokens=12",
         "--modes=[window,online,memory,lookup]", *LEARN],
    ],
    "profile": [
        ["--contexts=[20,40]", "--rows=[1,2]", "--repeats=1"],
        ["--records={out}", "--workload={tasks}", "--max-new-tokens=22", "--compressions=[none]"],
    ],
    "sweep": [["--path={path}", *LEARN, '--vary={{"rank": [2]}}', "--out={out}"]],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tiny.save_pair(tiny.model("llama3.1"), 0.1, tmp_path_factory.mktemp("pair"))
    talk = {"conversations": [{"id": "a", "turns": ["abc", "de"]}]}
    tasks = [{"id": f"{task}-{i}", "turns": ["abc"[i] * 3]} for task in "xy" for i in range(3)]
    (root / "talk.json").write_text(json.dumps(talk))
    (root / "tasks.json").write_text(json.dumps({"conversations": tasks}))
    made = {name: str(root / f"{name}.json") for name in ("talk", "tasks", "path")}
    made |= {name: str(root / name) for name in ("target", "draft")}
    text = [*TEXT, f"--workload={made['talk']}", f"--out={made['path']}"]
    assert main(["record", *models(made), f"--draft={made['draft']}", *text]) == 0
    return made


def models(files):
    return [f"--target={files['target']}", "--dtype=float32"]


def watched(options, seen):
    """``options`` that notes which of its fields are asked for, but to be checked or written."""
    fields = {field.name for field in dataclasses.fields(options)}

    class Watched(options):
        def __getattribute__(self, name):
            asking = sys._getframe(1).f_code
            idle = asking.co_filename == dataclasses.__file__ or asking.co_name == "__post_init__"
            if name in fields and not idle:
                seen.add(name)
            return super().__getattribute__(name)

    Watched.__qualname__ = Watched.__name__ = options.__name__
    Watched.__doc__ = options.__doc__
    return Watched, fields


@pytest.mark.parametrize("name", RUNS)
def test_every_option_is_read(name, files, tmp_path, monkeypatch):
    verb, seen = VERBS[name], set()
    module = importlib.import_module(verb.module)
    options, fields = watched(getattr(module, verb.options), seen)
    monkeypatch.setattr(module, verb.options, options)
    for index, flags in enumerate(RUNS[name]):
        here = files | {"out": f"{tmp_path}/out{index}.jsonl", "results": f"{tmp_path}/results"}
        common = models(files)
        if "draft" in fields:
            common += [f"--draft={files['draft']}"]
        if "results" in fields:
            common += [f"--results={here['results']}"]
        if "wandb" in fields:
            common += ["--wandb=disabled"]
        assert main([name, *common, *(flag.format(**here) for flag in flags)]) == 0
    assert fields - seen == set()
