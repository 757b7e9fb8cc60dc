"""The arms that a run compares: ways to decode the same text with the same two models."""

from collections.abc import Callable

from controllers import make_policy
from experiments.options import SpeculationOptions
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.models import ModelPair

Build = Callable[[ModelPair, SpeculationOptions], SpeculativeDecoder]


def _target(pair: ModelPair, options: SpeculationOptions) -> SpeculativeDecoder:
    policy = make_policy("fixed", gamma=0)
    return SpeculativeDecoder(pair, policy=policy, acceptance=options.acceptance)


def _static(pair: ModelPair, options: SpeculationOptions) -> SpeculativeDecoder:
    policy = make_policy(options.policy, gamma=options.gamma)
    return SpeculativeDecoder(pair, policy=policy, acceptance=options.acceptance)


def _window(pair: ModelPair, options: SpeculationOptions) -> SpeculativeDecoder:
    policy = make_policy(options.policy, gamma=options.gamma)
    return SpeculativeDecoder(
        pair, policy=policy, acceptance=options.acceptance, draft_window=options.window
    )


ARMS: dict[str, Build] = {"target": _target, "static": _static, "window": _window}


def check_arms(names: tuple[str, ...]) -> None:
    """Raise UserError for no arm, an unknown one, or one twice."""
    if not names:
        raise UserError(f"arms: none given: choose from {', '.join(ARMS)}")
    for name in names:
        if name not in ARMS:
            raise UserError(f"arms: {name!r} is not one of {', '.join(ARMS)}")
    if len(set(names)) < len(names):
        raise UserError(f"arms: {', '.join(names)} names one twice")
