"""A rule that must draft, given leave not to: it plays only while it is the faster of the two."""

from typing import Any

from controllers.plain import Plain
from tts.policy import LengthPolicy, RoundOutcome, RoundState, Signals

FIRST = 8  # rounds that alternate in pairs before anything is judged
PROBE = 16  # every so many rounds the slower of the two plays two
RATE = 1 / 16  # per round played, of the measured tokens and milliseconds


class OrNone(Plain):
    """Lets ``policy`` draft, or nobody, whichever lately gave more tokens per second.

    Published rules never plan 0. Where no draft pays they lose by that alone; with this around them
    they lose only by how they draft.
    """

    def __init__(self, policy: LengthPolicy) -> None:
        self._policy = policy
        self._rounds = 0
        self._drafting = True  # this round is the policy's
        self._behind = False  # the draft has not read the newest tokens
        self._tokens, self._ms = [0.0, 0.0], [0.0, 0.0]  # without and with drafts, decayed

    def plan(self, state: RoundState) -> int:
        none, drafts = (
            tokens / ms if ms else 0.0 for tokens, ms in zip(self._tokens, self._ms, strict=True)
        )
        self._drafting = drafts >= none
        if self._rounds < FIRST:
            self._drafting = self._rounds % 4 < 2
        elif self._rounds % PROBE < 2:
            self._drafting = not self._drafting
        self._rounds += 1
        return self._policy.plan(state) if self._drafting else 0

    def proceed(self, state: RoundState, signals: Signals) -> bool:
        return self._policy.proceed(state, signals)

    def observe(self, outcome: RoundOutcome) -> None:
        played = int(self._drafting)
        behind, self._behind = self._behind and self._drafting, not self._drafting
        if not behind:  # else the draft first read what it had missed
            rate = RATE if self._ms[played] else 1.0
            self._tokens[played] += rate * (outcome.num_accepted + 1 - self._tokens[played])
            self._ms[played] += rate * (outcome.draft_ms + outcome.verify_ms - self._ms[played])
        if self._drafting:
            self._policy.observe(outcome)

    def reset(self) -> None:
        self._policy.reset()
        self._behind = False

    def state_dict(self) -> dict[str, Any]:
        own = {"rounds": self._rounds, "tokens": list(self._tokens), "ms": list(self._ms)}
        own["behind"] = self._behind
        return own | {f"policy.{k}": v for k, v in self._policy.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rounds, self._behind = int(state["rounds"]), bool(state["behind"])
        self._tokens, self._ms = list(state["tokens"]), list(state["ms"])
        theirs = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
        self._policy.load_state_dict(theirs)
