"""Length policies: how many tokens to draft before the target verifies."""

from controllers.fixed import Fixed
from tts.errors import UserError
from tts.policy import LengthPolicy

CAP = 32  # the largest gamma any policy may plan

POLICIES = {"fixed": Fixed}


def make_policy(name: str, *, gamma: int = 4) -> LengthPolicy:
    """The policy called ``name``.

    Args:
        name: one of ``POLICIES``.
        gamma: its speculation length; 0 is the target alone.

    Raises:
        UserError: for an unknown name or a gamma outside 0..`CAP`.
    """
    if name not in POLICIES:
        raise UserError(f"policy: {name!r} is not one of {', '.join(POLICIES)}")
    if not 0 <= gamma <= CAP:
        raise UserError(f"gamma: {gamma} is outside 0..{CAP}")
    return POLICIES[name](gamma)
