"""How a draft learns while it decodes; importing this loads no model library."""

from dataclasses import dataclass

from tts.distill.losses import LOSSES
from tts.errors import UserError

SCOPES = ("sequence", "session")
KEYS = ("keep", "recompute")
RAREST = 4  # strides between two updates, at most: updates that gain nothing become rarer


@dataclass(frozen=True)
class DistillConfig:
    """How the draft learns while it decodes.

    Args:
        loss: one of `tts.distill.losses.LOSSES`.
        learning_rate: of AdamW.
        beta1: of AdamW.
        beta2: of AdamW.
        rank: of the adapter.
        alpha: its scaling is alpha / rank.
        targets: linear layers that are adapted (none: those that suit the draft).
        layers: decoder layers that are adapted (None: all that suit the draft).
        stride: committed positions between two steps.
        window: newest positions a step learns from.
        replay: further windows a step learns from, drawn from the older evidence.
        warmup: steps over which the learning rate rises.
        clip: maximal gradient norm.
        proximal: weight of KL(bare draft || draft), which holds the adapter near nothing.
        capacity: positions of evidence that are kept.
        guard: compare with the bare draft, and take back what loses against it.
        max_update_share: of wall time, for updates; 1 sets no limit, so that their schedule depends
            on the text alone.
        scope: ``sequence`` starts anew with every sequence, ``session`` carries on.
        keys: what becomes of the draft's cached keys after a step: ``keep`` them as they are, or
            ``recompute`` those of the newest ``window`` positions.
        seed: of the adapter and the replay.
    """

    loss: str = "jsd"
    learning_rate: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    stride: int = 32
    window: int = 32
    replay: int = 0
    warmup: int = 0
    clip: float = 1.0
    proximal: float = 0.0
    capacity: int = 2048
    guard: bool = True
    max_update_share: float = 0.08
    scope: str = "sequence"
    keys: str = "keep"
    seed: int = 0

    def __post_init__(self) -> None:
        def check(field: str, holds: bool, legal: str) -> None:
            if not holds:
                raise UserError(f"{field}: {getattr(self, field)!r} is not {legal}")

        check("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}")
        check("scope", self.scope in SCOPES, f"one of {', '.join(SCOPES)}")
        check("keys", self.keys in KEYS, f"one of {', '.join(KEYS)}")
        for field in ("learning_rate", "clip", "alpha"):
            check(field, 0 < getattr(self, field) < float("inf"), "a positive number")
        check("max_update_share", 0 < self.max_update_share <= 1, "in (0, 1]")
        for field in ("rank", "stride", "window", "capacity"):
            check(field, getattr(self, field) >= 1, "at least 1")
        for field in ("replay", "warmup", "proximal"):
            check(field, getattr(self, field) >= 0, "at least 0")
        for field in ("beta1", "beta2"):
            check(field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        least = max(self.window, RAREST * self.stride)  # what the rarest update has to find
        check(
            "capacity", self.capacity >= least, f"at least the window and {RAREST} strides, {least}"
        )
