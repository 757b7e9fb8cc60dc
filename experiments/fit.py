"""`tts fit`: the weights that the gamma MLP starts from, fitted on recorded conversations."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import track

from controllers.fixed import Fixed
from controllers.mlp import SHIPPED, Mlp, Round, examples, loss_and_gradient
from experiments.decode import decode
from experiments.options import ModelOptions, TextOptions
from experiments.workload import PathFile
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.policy import RoundOutcome


@dataclass(frozen=True)
class Fit(ModelOptions, TextOptions):
    """Decode recorded conversations with a fixed gamma and fit the gamma MLP to what happened.

    Args:
        path: a file of `tts record`, of conversations that nothing is judged on.
        gamma: drafted in every round, so that deep offsets are seen.
        epochs: passes over the examples.
        out: JSON file of the weights ("": those that `make_policy` starts from).
    """

    path: str = ""
    gamma: int = 6
    epochs: int = 30
    out: str = ""


class Watched(Fixed):
    """The fixed policy, which keeps what every round taught."""

    def __init__(self, gamma: int) -> None:
        super().__init__(gamma)
        self.rounds: list[Round] = []

    def observe(self, outcome: RoundOutcome) -> None:
        self.rounds.append(
            (outcome.state, outcome.signals, outcome.acceptance(), outcome.num_accepted)
        )


def fit(config: Fit) -> dict[str, Any]:
    """Decode, fit on all conversations but the last, report on the last; write the weights."""
    if not config.path:
        raise UserError("path: give a file of `tts record`")
    path = PathFile.read(config.path)
    path.check(config, config)
    dialogues = path.dialogues[: config.conversations or None]
    if len(dialogues) < 2:
        raise UserError("conversations: fitting and checking need at least 2")
    pair = config.load()
    watched = []
    for dialogue in track(dialogues, "decoding"):
        policy = Watched(config.gamma)
        decoder = SpeculativeDecoder(pair, policy=policy, acceptance="coupled")
        decode(decoder, dialogue, replace(config, conversations=1))
        watched.append(examples(policy.rounds))
    *train, test = watched
    mlp = Mlp(seed=config.seed)
    before, _ = loss_and_gradient(mlp.weights, test)
    for epoch in range(config.epochs):
        mlp.train(train[epoch % len(train)], 1)
    after, _ = loss_and_gradient(mlp.weights, test)
    out = Path(config.out) if config.out else SHIPPED
    mlp.save(out)
    return {
        "out": str(out),
        "examples": sum(len(part.features) for part in watched),
        "held_out_loss": {"prior": before, "fitted": after},
    }
