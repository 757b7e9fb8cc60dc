"""The schema of everything measured: one record a round."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class UpdateRecord:
    """One step of the draft's learner, taken after a round."""

    loss: float
    grad_norm: float
    lost_mass: float  # of the target outside the draft's vocabulary, mean
    overlap: float  # of the adapted draft on the window, before the step; nothing truncated
    gain: float | None  # overlap over the bare draft's, on rows that no step had seen
    smoothed_gain: float | None  # what the guard goes by
    event: str | None  # "skipped", "restored" or "reset"
    adapter_version: int
    update_ms: float = 0.0  # everything: guard, gradients, optimizer, rewriting


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
    num_drafted: int  # copies included
    num_accepted: int  # bonus excluded
    num_emitted: int  # bonus included
    stop_reason: str | None  # why the generation ended here, if it did
    num_copied: int = 0  # of the drafts: those that no model made
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
    adapted: bool = False  # the draft of this round had learned something
    update: UpdateRecord | None = None
    total_ms: float = 0.0  # the whole round with its update, prefill excluded
