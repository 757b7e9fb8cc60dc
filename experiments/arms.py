"""The arms that a run compares: ways to decode the same text with the same two models."""

from typing import NamedTuple

from controllers import HEADS, PUBLISHED, make_policy
from experiments.options import LengthOptions, PolicyOptions, SpeculationOptions
from tts.distill.config import DistillConfig
from tts.drafting import PromptLookup
from tts.engine import SpeculativeDecoder
from tts.errors import UserError
from tts.fingerprint import model_fingerprint
from tts.models import PROMPT_LOOKUP, ModelPair
from tts.policy import LengthPolicy


class Arm(NamedTuple):
    """What is switched on."""

    policy: str = ""  # that chooses the length instead of the one asked for
    draft: bool = False  # the draft learns
    whole: bool = False  # the draft reads all of its context, not only the newest
    lookup: bool = False  # what comes back is copied, the draft does the rest
    memory: bool = False  # what the target said where the draft was in a like state comes back
    gamma: int | None = None  # instead of the one asked for


LASTING = ("mlp", "bandit", "heuristic")  # policies that learn on from sequence to sequence

ARMS = {
    "target": Arm(policy="fixed", gamma=0),
    "static": Arm(whole=True),
    "window": Arm(),
    "draft": Arm(draft=True, whole=True),
    "draft_window": Arm(draft=True),
    "memory": Arm(memory=True),
    "memory_draft": Arm(memory=True, draft=True),
    "gamma": Arm(policy="mlp"),
    "memory_gamma": Arm(policy="mlp", memory=True),
    "memory_both": Arm(policy="mlp", memory=True, draft=True),
    "memory_lookup": Arm(policy="mlp", memory=True, lookup=True),
    "both": Arm(policy="mlp", draft=True),
    "lookup": Arm(policy="mlp", lookup=True),
    "lookup_both": Arm(policy="mlp", lookup=True, draft=True),
    **{name: Arm(policy=name) for name in (*PUBLISHED, "oracle")},
}


def build(
    name: str,
    pair: ModelPair,
    options: SpeculationOptions,
    policy: LengthPolicy,
    distill: DistillConfig | None = None,
    remember: bool = False,
) -> SpeculativeDecoder:
    """The decoder of the arm ``name``.

    Args:
        name: of the arm.
        pair: that it decodes with.
        options: how it drafts.
        policy: that it plays.
        distill: how its draft learns, where the arm lets it (None: it does not).
        remember: with a memory, whatever the arm says.
    """
    arm = ARMS[name]
    return SpeculativeDecoder(
        pair,
        policy=policy,
        distill=distill if arm.draft else None,
        acceptance=options.acceptance,
        draft_window=None if arm.whole else options.window,
        lookup=PromptLookup(shortest=options.lookup) if arm.lookup else None,
        memory=options.memory if arm.memory or remember else None,
    )


def build_policy(name: str, gamma: int, pair: ModelPair, options: LengthOptions) -> LengthPolicy:
    """The policy ``name``, if fixed at ``gamma``, for ``pair``.

    Raises:
        UserError: if it was fitted for another draft.
    """
    return make_policy(
        name,
        gamma=gamma,
        cap=options.cap,
        learning=options.gamma_updates,
        compression=pair.compression,
        weights=options.weights_folder,
        draft=model_fingerprint(pair.draft_model) if name in HEADS else None,
    )


def policy_of(name: str, options: PolicyOptions) -> tuple[str, int]:
    """Which policy the arm ``name`` plays, and at which gamma if it is fixed."""
    arm = ARMS[name]
    return arm.policy or options.policy, options.gamma if arm.gamma is None else arm.gamma


def check_arms(names: tuple[str, ...], draft: str | None) -> None:
    """Raise UserError for no arm, an unknown one, one twice, or one that ``draft`` cannot do."""
    if not names:
        raise UserError(f"arms: none given: choose from {', '.join(ARMS)}")
    for name in names:
        if name not in ARMS:
            raise UserError(f"arms: {name!r} is not one of {', '.join(ARMS)}")
        if ARMS[name].draft and draft == PROMPT_LOOKUP:
            raise UserError(f"arms: {name} needs a draft that learns, {draft} copies: leave it out")
        if (ARMS[name].memory or ARMS[name].policy in HEADS) and draft == PROMPT_LOOKUP:
            raise UserError(
                f"arms: {name} reads the draft's states, {draft} has none: leave it out"
            )
    if len(set(names)) < len(names):
        raise UserError(f"arms: {', '.join(names)} names one twice")
