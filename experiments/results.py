"""A results folder: written as it is measured, atomic where it is rewritten, never overwritten."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import yaml

from tts.errors import UserError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "wandb")


class Results:
    """``<root>/<verb>/<run id>/`` with the resolved config, the command and everything measured.

    Args:
        root: parent folder of all results.
        verb: the command that ran.
        run_id: a new one if empty.
        config: written as ``config.yaml``; `tts VERB --config config.yaml` runs it again.

    Raises:
        UserError: if the folder exists for another config or unfinished, or cannot be written.
    """

    def __init__(self, root: str, verb: str, run_id: str, config: Any) -> None:
        self._resolved = yaml.safe_dump(_plain(asdict(config)), sort_keys=False)
        if Path(run_id).name != run_id:
            raise UserError(f"run_id: {run_id!r} is no name of a folder: leave out the path")
        name = run_id or datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex()
        self.folder = Path(root).expanduser() / verb / name
        self._files: dict[str, TextIO] = {}
        if self.folder.exists():
            self._check_same()
            return
        try:
            self.folder.mkdir(parents=True)
            self.write("config.yaml", self._resolved)
            self.write("command.txt", _provenance())
        except OSError as error:
            raise UserError(
                f"results: {self.folder} cannot be written ({error.strerror}): choose another "
                "folder with --results"
            ) from None

    @contextmanager
    def starting(self) -> Iterator[None]:
        """What is refused in here, before anything was measured, leaves no folder behind."""
        try:
            yield
        except UserError:
            if not self._files:
                shutil.rmtree(self.folder)
            raise

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that ended here, or None."""
        file = self.folder / "summary.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def append(self, name: str, row: Any) -> None:
        """One JSON line, flushed: what was measured survives whatever comes."""
        if name not in self._files:
            self._files[name] = (self.folder / name).open("a")
        print(json.dumps(asdict(row) if is_dataclass(row) else row), file=self._files[name])
        self._files[name].flush()

    def write(self, name: str, text: str) -> None:
        """A whole file, atomically."""
        partial = self.folder / f".{name}.partial"
        partial.write_text(text)
        partial.rename(self.folder / name)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``; its ``status`` says whether the run came to its end."""
        for file in self._files.values():
            file.close()
        if not self.folder.exists():  # its start was refused
            return
        self.write("summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _check_same(self) -> None:
        config = self.folder / "config.yaml"
        same = config.is_file() and config.read_text() == self._resolved
        done = self.finished
        if not (same and done and done["status"] == "finished"):
            raise UserError(
                f"run_id: {self.folder} exists with another config or an unfinished run: choose "
                "another run_id"
            )


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML stays plain."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _provenance() -> str:
    """Command, commit and versions; best effort, never a reason to stop."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
            )
            return done.stdout.strip()
        except OSError:
            return ""

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    lines = [
        shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        f"time: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"commit: {git('rev-parse', 'HEAD') or 'unknown'}",
        f"changed: {'yes' if git('status', '--porcelain', '-uno') else 'no'}",
        f"python: {sys.version.split()[0]}",
        *(f"{package}: {version_of(package)}" for package in PACKAGES),
        f"cpus: {os.cpu_count()}",
    ]
    return "\n".join(lines) + "\n"
