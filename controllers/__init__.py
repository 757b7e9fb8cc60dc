"""Length policies: how many tokens to draft before the target verifies."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from controllers.adaedl import AdaEdl
from controllers.bandit import Bandit
from controllers.confidence import Confidence
from controllers.fixed import Fixed
from controllers.hazard import COMPRESSION
from controllers.heuristic import Heuristic
from controllers.mlp import Mlp
from controllers.oracle import Oracle
from controllers.specdecpp import SpecDecPp
from controllers.speckv import Regressor, SpecKv
from controllers.svip import Svip
from tts.errors import UserError
from tts.policy import LengthPolicy

CAP = 40  # the largest gamma any policy may plan
WEIGHTS = Path(__file__).parent / "weights"  # what `tts fit` made: see experiments/LOG.md

RULES: dict[str, Callable[..., LengthPolicy]] = {
    "heuristic": Heuristic,
    "heuristic_transient": partial(Heuristic, transient=True),
    "confidence": Confidence,
    "svip": Svip,
    "adaedl": AdaEdl,
    "bandit": Bandit,
}
HEADS: dict[str, Callable[..., LengthPolicy]] = {
    "specdecpp": SpecDecPp,
    "specdecpp_by_cost": partial(SpecDecPp, by_cost=True),
}
PUBLISHED = (*RULES, "speckv", *HEADS)
POLICIES = ("fixed", "mlp", *PUBLISHED, "oracle")


def make_policy(
    name: str,
    *,
    gamma: int = 4,
    cap: int | None = None,
    learning: bool = True,
    seed: int = 0,
    compression: str = "none",
    weights: Path = WEIGHTS,
    draft: str | None = None,
) -> LengthPolicy:
    """The policy called ``name``; what it has no use for is checked and left aside.

    Args:
        name: one of ``POLICIES``.
        gamma: speculation length of ``fixed``; 0 is the target alone.
        cap: largest gamma that any other policy plans (None: its own default).
        learning: whether ``mlp`` goes on learning while it decodes.
        seed: of the probes of ``mlp``.
        compression: of the target's weights, a feature of ``mlp`` and ``speckv``: one of
            ``COMPRESSION``.
        weights: folder of `tts fit`, for the policies that are fitted.
        draft: fingerprint of the draft that the head of ``specdecpp`` must fit (None: any).

    Raises:
        UserError: for an unknown name or compression, a gamma outside 0..`CAP`, a cap outside
            1..`CAP`, weights that are missing or were fitted for another draft.
    """
    if name not in POLICIES:
        raise UserError(f"policy: {name!r} is not one of {', '.join(POLICIES)}")
    if not 0 <= gamma <= CAP:
        raise UserError(f"gamma: {gamma} is outside 0..{CAP}")
    if cap is not None and not 1 <= cap <= CAP:
        raise UserError(f"cap: {cap} is outside 1..{CAP}: for no drafting use fixed with gamma 0")
    if compression not in COMPRESSION:
        raise UserError(f"compression: {compression!r} is not one of {', '.join(COMPRESSION)}")
    capped = {} if cap is None else {"cap": cap}
    if name == "fixed":
        return Fixed(gamma)
    if name == "oracle":
        return Oracle(**capped)
    if name == "mlp":
        code, file = COMPRESSION[compression], weights / "mlp.json"
        return Mlp.load(file, learning=learning, seed=seed, compression=code, **capped)
    if name == "speckv":
        regressor = Regressor.load(weights / "speckv.json")
        return SpecKv(regressor, compression=compression, **capped)
    if name in HEADS:
        return HEADS[name](weights / "specdecpp.safetensors", draft=draft, **capped)
    return RULES[name](**capped)
