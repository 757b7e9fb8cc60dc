"""The speculative decoder: rounds of draft, verify, accept, roll back.

pair = load_pair("smollm2-135m")
decoder = SpeculativeDecoder(pair, policy=make_policy("fixed", gamma=4), acceptance="coupled")
result = decoder.generate(input_ids, generation_config=GenerationConfig(max_new_tokens=500))
result.summary().mean_acceptance_length
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tts.acceptance import (
    RULES,
    AcceptanceRule,
    Coupled,
    Recorded,
    check_acceptance,
    on_common_ids,
    overlap,
)
from tts.cached_model import CachedModel, Rows
from tts.custom_generate import check_handover, own_criteria
from tts.distill.config import DistillConfig
from tts.drafting import Memory, PromptLookup, PromptLookupDrafter, make_drafter
from tts.drafting.protocol import Drafter, Proposal, TrainableDrafter
from tts.errors import UserError
from tts.evidence import Rows as Evidence
from tts.metrics import Summary, summarise
from tts.models import ModelPair, learned_positions
from tts.policy import LengthPolicy, RoundOutcome, RoundState, Signals
from tts.records import RoundRecord, UpdateRecord
from tts.sampling import Distribution, Warper
from tts.settings import Sampling, resolve
from tts.stopping import Stopping
from tts.stopwatch import Stopwatch

if TYPE_CHECKING:
    from tts.coordinator import Coordinator, Lesson

MAX_LAG = 128  # committed positions whose overlap may wait for the draft's row
NOTHING = Proposal([], [], [], [])

OnRound = Callable[[RoundRecord], None]


@dataclass(slots=True)
class Session:
    """A sequence and the two caches that hold it; may be extended by further prompts."""

    target: CachedModel
    drafter: Drafter
    lesson: "Lesson | None" = None  # what the draft learns from
    sequence: list[int] = field(default_factory=list)
    generated: int = 0  # tokens of the sequence that the target wrote
    rounds: int = 0
    # the target's rows of the newest committed positions that have no row of q yet
    pending: list[Distribution] = field(default_factory=list)


@dataclass(slots=True)
class GenerationResult:
    """Tokens and everything measured on the way."""

    sequences: torch.Tensor  # int64 [1, prompt + new]
    tokens: list[int]  # the new ones
    rounds: list[RoundRecord]
    finish_reason: str  # "eos", "stop", "length", "time"

    def summary(self) -> Summary:
        return summarise(self.rounds)


@dataclass(frozen=True, slots=True)
class _Run:
    """What stays the same during one generation."""

    rule: AcceptanceRule
    warp: Warper
    stopping: Stopping
    sampling: Sampling
    start: int  # length of the prompt
    end: int  # the sequence may not grow beyond


class SpeculativeDecoder:
    """Decodes with a target and its draft; the text is the target's own.

    Args:
        pair: from `load_pair`.
        policy: chooses gamma in each round (`controllers.make_policy`).
        distill: how the draft learns while it decodes (None: not at all, at no cost).
        acceptance: ``greedy`` (temperature 0), ``rejection``, ``block`` (keeps more of a block) or
            ``coupled``; see `tts.acceptance`.
        draft_window: sliding window over the context of a draft model (None: all of it).
        lookup: copy what followed the last time where the newest tokens match, and let the draft
            do the rest (None: it does all).
        memory: mix into the draft what the target said where the draft was in a like state (None:
            the draft as it is).

    Raises:
        UserError: for an unknown rule, a policy's name, a window below 1, or a draft or target that
            cannot do what ``distill`` or ``memory`` asks of it.
    """

    def __init__(
        self,
        pair: ModelPair,
        *,
        policy: LengthPolicy,
        distill: DistillConfig | None = None,
        acceptance: str = "rejection",
        draft_window: int | None = None,
        lookup: PromptLookup | None = None,
        memory: Memory | None = None,
    ) -> None:
        check_acceptance(acceptance)
        if isinstance(policy, str):
            raise UserError(f"policy: {policy!r} is a name: give make_policy({policy!r})")
        if draft_window is not None and draft_window < 1:
            raise UserError(f"draft_window: {draft_window} sees nothing: use at least 1, or none")
        self.pair, self.policy, self.acceptance = pair, policy, acceptance
        self._draft_window, self._lookup, self._memory = draft_window, lookup, memory
        self.coordinator = None if distill is None else _coordinator(pair, distill)
        text = pair.target.config.get_text_config()
        if not hasattr(text, "max_position_embeddings"):
            raise UserError(
                "target: its config has no max_position_embeddings: choose one with a known context"
            )
        self._context: int = text.max_position_embeddings
        self._vocab_size: int = text.vocab_size
        self._draft_positions = learned_positions(pair.draft)

    def session(self) -> Session:
        """Empty caches for a sequence; hand it to `generate` again to extend the sequence."""
        self.policy.reset()
        draft = self.pair.draft if self.coordinator is None else self.coordinator.live
        drafter = make_drafter(draft, self._vocab_size, self._draft_window, self._memory)
        lesson = None
        if self.coordinator is not None:  # else the drafter may be one that cannot learn
            lesson = self.coordinator.lesson(cast(TrainableDrafter, drafter))
        if self._lookup is not None and not isinstance(drafter, PromptLookupDrafter):
            drafter = PromptLookupDrafter(self._lookup, drafter)
        return Session(CachedModel(self.pair.target, layers=drafter.layers), drafter, lesson)

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        generation_config: GenerationConfig | None = None,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        path: list[int] | None = None,
        session: Session | None = None,
        on_round: OnRound | None = None,
    ) -> GenerationResult:
        """Decode after ``input_ids`` `[1, prompt]`.

        Args:
            input_ids: the prompt; with a ``session``, what comes after its sequence.
            generation_config: as for ``target.generate``; fields that cannot be honoured are
                refused by name.
            seed: of the acceptance rule. Under ``coupled`` the text is a function of it alone.
            streamer: gets the prompt, then each round's tokens.
            stopping_criteria: asked once a token, without scores.
            path: commit these tokens instead (`tts.acceptance.Recorded`); ``coupled`` or greedy.
            session: from `session`, to continue with warm caches.
            on_round: called after every round with its record.

        Raises:
            UserError: for a prompt that is empty, batched or longer than the context, for a text
                that may outgrow the draft, and for settings that cannot be honoured.
        """
        before = 0 if session is None else len(session.sequence)
        prompt = self._prompt(input_ids, before)
        start = before + len(prompt)
        sampling, limits = resolve(self.pair.target, generation_config, start)
        warp = Warper(sampling, start)
        end = min(start + limits.max_new_tokens, self._context)
        if self._draft_positions is not None and end > self._draft_positions:
            raise UserError(
                f"max_new_tokens: the text may reach {end} tokens, and the draft's learned "
                f"positions end at {self._draft_positions}: ask for fewer, or choose another draft"
            )
        run = _Run(
            self._rule(sampling, seed, path, start),
            warp,
            Stopping(sampling, limits, self.pair.tokenizer, stopping_criteria),
            sampling,
            start,
            end if path is None else min(end, start + len(path)),
        )
        session = session or self.session()  # what is refused has changed nothing so far
        if streamer is not None:
            streamer.put(input_ids)
        session.sequence.extend(prompt)
        try:
            rounds = self._rounds(session, run, streamer, on_round)
        except BaseException:  # the caches may be anywhere: they are filled anew when it goes on
            fresh = self.session()
            session.target, session.drafter = fresh.target, fresh.drafter
            session.lesson, session.pending = fresh.lesson, fresh.pending
            raise
        if streamer is not None:
            streamer.end()
        sequences = torch.tensor([session.sequence], device=input_ids.device)
        reason = rounds[-1].stop_reason
        assert reason is not None
        return GenerationResult(sequences, session.sequence[start:], rounds, reason)

    def _rounds(
        self,
        session: Session,
        run: _Run,
        streamer: BaseStreamer | None,
        on_round: OnRound | None,
    ) -> list[RoundRecord]:
        """Read the prompt, then draft, verify and learn until something says stop."""
        start = run.start
        session.drafter.begin(lambda columns: Warper(run.sampling, start, columns))
        clock = Stopwatch(self.pair.target.device)
        features = None
        if session.target.length < start - 1:
            unread = session.sequence[session.target.length : -1]
            rows = session.target.feed(unread, max(1, min(session.drafter.hears, len(unread))))
            session.drafter.hear(rows.logits, start - len(rows.logits))
            features = rows.features
        session.drafter.prefill(session.sequence, features)
        prefill_ms = clock.lap()
        rounds: list[RoundRecord] = []
        while not rounds or rounds[-1].stop_reason is None:
            before = len(session.sequence)
            rounds.append(self._round(session, run))
            rounds[-1].prefill_ms, prefill_ms = prefill_ms, 0.0
            if streamer is not None:
                streamer.put(torch.tensor(session.sequence[before:]))
            if on_round is not None:
                on_round(rounds[-1])
        return rounds

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int = 0,
        path: list[int] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """For ``target.generate(input_ids, custom_generate=decoder, seed=0, ...)``.

        The empty cache that transformers prepares is ignored, a filled one refused. transformers
        does not hand a ``streamer`` to a callable (it puts the prompt into it and nothing more),
        nor the tokenizer that ``stop_strings`` need (it raises): for either call `generate`.
        """
        config = generation_config or model.generation_config
        check_handover(self.pair.target, model, input_ids, config, logits_processor, kwargs)
        result = self.generate(
            input_ids,
            generation_config=config,
            seed=seed,
            stopping_criteria=own_criteria(stopping_criteria, config),
            path=path,
        )
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=result.sequences)
        return result.sequences

    def _round(self, session: Session, run: _Run) -> RoundRecord:
        """Draft, verify, accept, roll back."""
        clock = Stopwatch(self.pair.target.device)
        sequence, context = session.sequence, len(session.sequence)
        at_hand = session.drafter.at_hand(sequence)
        state = RoundState(session.generated, context, run.end - context - 1, at_hand)
        gamma = min(self.policy.plan(state), state.limit)
        adapted = self.coordinator is not None and self.coordinator.adapted
        policy_ms, draft_ms = clock.lap(), 0.0

        def proceed(signals: Signals) -> bool:
            nonlocal policy_ms, draft_ms
            draft_ms += clock.lap()
            on = self.policy.proceed(state, signals)
            policy_ms += clock.lap()
            return on

        proposal, overlaps = NOTHING, []
        if gamma > 0:
            proposal = session.drafter.propose(
                sequence, gamma, len(session.pending), run.rule.draw, proceed
            )
            overlaps = _settle(session, proposal.late)
        drafts, drafted = proposal.tokens, len(proposal.tokens)
        draft_ms += clock.lap()

        session.target.mark()
        read = session.target.length
        rows = session.target.feed(sequence[session.target.length :] + drafts, keep=drafted + 1)
        p = run.warp(rows.logits, sequence + drafts, context)
        verdict = run.rule.judge(p, proposal.q, drafts, context)
        new = [*drafts[: verdict.num_accepted], verdict.token]
        cut = run.stopping.cut(sequence, new)
        reason = cut.reason or ("length" if context + cut.kept == run.end else None)

        on_path = min(cut.kept, verdict.num_accepted + 1, drafted)
        acceptance: Callable[[], list[float]] = list
        if on_path:
            common = on_common_ids(p[:on_path], proposal.q[:on_path])
            acceptance = partial(run.rule.probability, common, drafts[:on_path])
            overlaps += [(session.generated + j, x) for j, x in enumerate(overlap(common))]
        if cut.kept > drafted:
            session.pending.append(p[drafted])
        sequence.extend(new[: cut.kept])
        session.generated += cut.kept
        session.target.rollback(len(sequence) - 1)
        kept = slice(len(sequence) - 1 - read)
        session.drafter.commit(
            len(sequence), None if rows.features is None else rows.features[kept]
        )
        verify_ms = clock.lap()

        session.drafter.hear(rows.logits[: cut.kept], context)
        draft_ms += clock.lap()
        said = proposal.signals
        self.policy.observe(
            RoundOutcome(state, verdict.num_accepted, said, acceptance, draft_ms, verify_ms)
        )
        policy_ms += clock.lap()
        # what earlier rounds are owed is no cost of this one's length
        if session.pending and (reason or len(session.pending) >= MAX_LAG):
            late = session.drafter.catch_up(sequence, len(session.pending))
            overlaps += _settle(session, late)
        draft_ms += clock.lap()
        update = self._learn(session, run, rows, context, drafted, reason is not None, clock)
        clock.lap()  # what was learned has its own time, and belongs to the whole
        session.rounds += 1
        return RoundRecord(
            round=session.rounds - 1,
            position=state.position,
            context_length=context,
            gamma=gamma,
            num_drafted=drafted,
            num_accepted=verdict.num_accepted,
            num_emitted=cut.kept,
            stop_reason=reason,
            num_copied=sum(s.copied for s in said),
            entropy=[s.entropy for s in said],
            confidence=[s.confidence for s in said],
            overlap=[value for _, value in overlaps],
            overlap_position=[position for position, _ in overlaps],
            mismatches=verdict.mismatches,
            draft_ms=draft_ms,
            verify_ms=verify_ms,
            policy_ms=policy_ms,
            adapted=adapted,
            update=update,
            total_ms=clock.total(),
        )

    def _learn(
        self,
        session: Session,
        run: _Run,
        rows: Rows,
        context: int,
        drafted: int,
        ended: bool,
        clock: Stopwatch,
    ) -> UpdateRecord | None:
        """Show the verification's on-path rows to the coordinator, who may take a step."""
        if self.coordinator is None or session.lesson is None:
            return None
        emitted = len(session.sequence) - context
        features = None
        if rows.features is not None:  # of all rows that were fed, the last are those verified
            features = rows.features[-len(rows.hidden) :][:emitted]
        evidence = Evidence(context, rows.hidden[:emitted], features)
        self.coordinator.observe(session.lesson, evidence, drafted > 0, clock.total())
        if ended:  # nobody may ever draft again; if the session goes on, its next round learns
            return None
        return self.coordinator.update(
            session.lesson,
            session.sequence,
            len(session.sequence) - len(session.pending),
            run.sampling.temperature or 1.0,  # greedy decoding has none to learn at
        )

    def _prompt(self, input_ids: torch.Tensor, before: int) -> list[int]:
        """The new tokens, which come after so many that a session holds."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
            raise UserError(
                f"input_ids: {type(input_ids).__name__} is no tensor of token ids: with a chat "
                "template, ask for return_tensors='pt' and return_dict=False"
            )
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise UserError(
                f"input_ids: shape {tuple(input_ids.shape)} is not [1, prompt]: decode one "
                "sequence at a time"
            )
        prompt: list[int] = input_ids[0].tolist()
        length = before + len(prompt)
        if not prompt:
            raise UserError("input_ids: the prompt is empty: give at least one token")
        if max(prompt) >= self._vocab_size or min(prompt) < 0:
            raise UserError(f"input_ids: a token is outside the vocabulary of {self._vocab_size}")
        if length >= self._context:
            raise UserError(
                f"input_ids: {length} tokens leave no room in the target's context of "
                f"{self._context}: shorten the prompt"
            )
        return prompt

    def _rule(
        self, sampling: Sampling, seed: int, path: list[int] | None, start: int
    ) -> AcceptanceRule:
        greedy = sampling.temperature == 0
        if self.acceptance == "greedy" and not greedy:
            raise UserError(
                "acceptance: greedy is for temperature 0: unset do_sample, or use rejection, block "
                "or coupled"
            )
        # at temperature 0 every rule keeps a draft that equals the target's best token
        rule = Coupled if greedy else RULES[self.acceptance]
        if path is None:
            return rule(int(seed), start)
        if rule is not Coupled:
            raise UserError(
                f"path: a recorded path needs acceptance coupled, not {self.acceptance}"
            )
        if not path:
            raise UserError("path: it has no tokens: record it again")
        if max(path) >= self._vocab_size or min(path) < 0:
            raise UserError(f"path: a token is outside the vocabulary of {self._vocab_size}")
        return Recorded(path, start, Coupled(int(seed)))


def _settle(session: Session, late: list[Distribution]) -> list[tuple[int, float]]:
    """(position, overlap) of all pending positions, now that the draft's rows ``late`` came."""
    values = overlap(on_common_ids(session.pending, late))
    first = session.generated - len(values)
    session.pending.clear()
    return [(first + i, value) for i, value in enumerate(values)]


def _coordinator(pair: ModelPair, config: DistillConfig) -> "Coordinator":
    from tts.coordinator import Coordinator  # PEFT takes seconds to load
    from tts.distill.learner import teacher_head

    return Coordinator(pair.draft, teacher_head(pair.target), config)
