"""The command line: `tts <verb>`; every verb is a dataclass of options and a function.

Options may come from a YAML file (`--config FILE`) and are overridden by flags; nested ones are
dotted (`--training.loss jsd`). Dashes and underscores are the same in flag names.
"""

import importlib
import json
import sys
from typing import NamedTuple

from jsonargparse import ArgumentError, ArgumentParser

from tts.errors import UserError


class Verb(NamedTuple):
    """Where a verb's options and function are; imported only when the verb is used."""

    module: str
    options: str
    function: str
    help: str


VERBS = {
    "run": Verb("experiments.run", "Run", "run", "decode conversations, curve over the output"),
    "record": Verb("experiments.record", "Record", "record", "write a token path for paired runs"),
    "bench": Verb("experiments.bench", "Bench", "bench", "time it beside transformers"),
    "profile": Verb(
        "experiments.profile", "Profile", "profile", "what a pass costs; records for `tts fit`"
    ),
    "compare": Verb(
        "experiments.compare", "Compare", "compare", "join the records of several runs"
    ),
    "fit": Verb("experiments.fit", "Fit", "fit", "fit the learned policies to step records"),
    "policies": Verb(
        "experiments.policies", "Policies", "policies", "every length policy on the same paths"
    ),
    "drafters": Verb(
        "experiments.drafters", "Drafters", "drafters", "every drafter on the same paths"
    ),
    "export": Verb("experiments.export", "Export", "export", "a policy as a table, for a server"),
    "sweep": Verb("experiments.sweep", "Sweep", "sweep", "compare learning settings on a path"),
    "speckv": Verb("experiments.speckv", "SpecKv", "speckv", "SpecKV's records, read twice"),
    "selftext": Verb(
        "experiments.distill_offline", "SelfText", "selftext", "let the target write training text"
    ),
    "distill-offline": Verb(
        "experiments.distill_offline", "DistillOffline", "distill_offline", "train a draft"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _run(arguments)
    except UserError as error:
        print(f"tts: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that went away
        print(f"tts: {error}: what was written before is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tts: interrupted; what was measured is written", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in VERBS:
        return _usage(arguments)
    verb = VERBS[arguments[0]]
    module = importlib.import_module(verb.module)
    importlib.import_module("transformers").logging.disable_progress_bar()
    options = getattr(module, verb.options)
    parser = ArgumentParser(prog=f"tts {arguments[0]}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_class_arguments(options)
    try:
        parsed = parser.parse_args([_normalised(argument) for argument in arguments[1:]])
        values = parser.instantiate(parsed).as_dict()
    except ArgumentError as error:
        said = " ".join(str(error).split())
        hint = ": write a list, as in '[a, b]'" if "<class 'tuple'>" in said else ""
        raise UserError(said + hint) from None
    values.pop("config", None)
    summary = getattr(module, verb.function)(options(**values))
    print(json.dumps(summary))
    return 0


def _usage(arguments: list[str]) -> int:
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.help}" for name, verb in VERBS.items()]
    text = "usage: tts VERB [options]   (tts VERB --help lists them)\n\n" + "\n".join(lines)
    if arguments and arguments[0] in ("-h", "--help"):
        print(text)
        return 0
    wrong = f"tts: {arguments[0]!r} is not a verb\n" if arguments else ""
    print(wrong + text, file=sys.stderr)
    return 2


def _normalised(argument: str) -> str:
    """--max-new-tokens as --max_new_tokens, and --no-x as --x=false."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name.startswith("no_") and not equals:
        return f"--{name[3:]}=false"
    return f"--{name}{equals}{value}"


if __name__ == "__main__":
    sys.exit(main())
