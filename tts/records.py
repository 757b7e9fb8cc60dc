"""The schema of everything measured: one record a round."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class RoundRecord:
    """One round: draft, verify, accept, roll back. All times are milliseconds of wall time.

    Counts are of the verified block, before a stop cut it: ``num_emitted`` is what the user got,
    and is num_accepted + 1 except where the generation ended inside the block.
    """

    round: int
    position: int  # index of the round's first generated token
    context_length: int  # tokens before the round, prompt included
    gamma: int  # what the policy planned
    num_drafted: int
    num_accepted: int  # bonus excluded
    num_emitted: int  # bonus included
    stop_reason: str | None  # why the generation ended here, if it did
    entropy: list[float] = field(default_factory=list)  # nats, one a drafted token
    confidence: list[float] = field(default_factory=list)  # one a drafted token
    # sum_x min(p, q) of committed positions whose second row came in this round: the on-path
    # offsets of this block, and earlier positions for which the draft had not been asked yet
    overlap: list[float] = field(default_factory=list)
    overlap_position: list[int] = field(default_factory=list)
    mismatches: int = 0  # committed tokens of a recorded path that the pass would not have chosen
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    policy_ms: float = 0.0
    total_ms: float = 0.0  # the whole round, prefill excluded
