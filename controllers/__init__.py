"""Length policies: how many tokens to draft before the target verifies."""

from collections.abc import Callable
from functools import partial

from controllers.adaedl import AdaEdl
from controllers.bandit import Bandit
from controllers.confidence import Confidence
from controllers.fixed import Fixed
from controllers.heuristic import Heuristic
from controllers.mlp import COMPRESSION, Mlp
from controllers.svip import Svip
from tts.errors import UserError
from tts.policy import LengthPolicy

CAP = 40  # the largest gamma any policy may plan

PUBLISHED: dict[str, Callable[..., LengthPolicy]] = {
    "heuristic": Heuristic,
    "heuristic_transient": partial(Heuristic, transient=True),
    "confidence": Confidence,
    "svip": Svip,
    "adaedl": AdaEdl,
    "bandit": Bandit,
}
POLICIES = ("fixed", "mlp", *PUBLISHED)


def make_policy(
    name: str,
    *,
    gamma: int = 4,
    cap: int | None = None,
    learning: bool = True,
    seed: int = 0,
    compression: str = "none",
) -> LengthPolicy:
    """The policy called ``name``; what it has no use for is checked and left aside.

    Args:
        name: one of ``POLICIES``.
        gamma: speculation length of ``fixed``; 0 is the target alone.
        cap: largest gamma that any other policy plans (None: its authors' own; 8 for ``mlp``).
        learning: whether ``mlp`` goes on learning while it decodes.
        seed: of the probes of ``mlp``.
        compression: of the target's weights, a feature of ``mlp``: one of ``COMPRESSION``.

    Raises:
        UserError: for an unknown name or compression, a gamma outside 0..`CAP`, a cap outside
            1..`CAP`.
    """
    if name not in POLICIES:
        raise UserError(f"policy: {name!r} is not one of {', '.join(POLICIES)}")
    if not 0 <= gamma <= CAP:
        raise UserError(f"gamma: {gamma} is outside 0..{CAP}")
    if cap is not None and not 1 <= cap <= CAP:
        raise UserError(f"cap: {cap} is outside 1..{CAP}: for no drafting use fixed with gamma 0")
    if compression not in COMPRESSION:
        raise UserError(f"compression: {compression!r} is not one of {', '.join(COMPRESSION)}")
    if name == "fixed":
        return Fixed(gamma)
    capped = {} if cap is None else {"cap": cap}
    if name == "mlp":
        code = COMPRESSION[compression]
        return Mlp.shipped(learning=learning, seed=seed, compression=code, **capped)
    return PUBLISHED[name](**capped)
