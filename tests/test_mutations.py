"""Proofs that can fail: each planted error breaks the named check that guards against it."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests import (
    test_dflash,
    test_drafters,
    test_eagle3,
    test_engine,
    test_kernels,
    test_learning,
    test_memory,
    test_prompt_lookup,
    tiny,
)
from tests.heads import PAIRS
from tests.test_kernels import exact_blocks
from tests.test_laws import flattened
from tts.acceptance import Coupled
from tts.cache import RollbackCache, RollbackLayer
from tts.cached_model import CachedModel
from tts.cached_model import Rows as DraftRows
from tts.coordinator import Coordinator
from tts.distill.adapter import Adapter
from tts.drafting import dflash as dflash_drafter
from tts.drafting.autoregressive import AutoregressiveDrafter
from tts.drafting.dflash import DFlashDrafter
from tts.drafting.eagle3_model import Eagle3
from tts.drafting.features import FeatureDrafter
from tts.drafting.memory import Recall
from tts.drafting.prompt_lookup import PromptLookupDrafter
from tts.evidence import Evidence
from tts.sampling import Warper
from tts.stopping import Cut, Stopping


def one_stale_position_survives_a_rollback(patch):
    def rollback(self, length):
        for layer in self.layers:
            if isinstance(layer, RollbackLayer) and length < layer.length:
                layer.rollback(length + 1)

    patch.setattr(RollbackCache, "rollback", rollback)


def the_lagging_token_is_never_fed_to_the_draft(patch):
    def feed(self, tokens, keep=1):
        rows = self._cached.feed(tokens[-1:] if len(tokens) == 2 else tokens)
        return DraftRows(*(x[-1:].expand(keep, -1) for x in rows[:2]))

    patch.setattr(AutoregressiveDrafter, "_feed", feed)


def the_draft_keeps_rejected_tokens(patch):
    patch.setattr(AutoregressiveDrafter, "commit", lambda self, length, features: None)


def the_penalty_forgets_the_drafts_before_a_row(patch):
    honest = Warper._penalised

    def penalised(self, scores, columns, sequence, first):
        rows = [honest(self, row[None], columns, sequence, first) for row in scores]
        return torch.cat(rows)

    patch.setattr(Warper, "_penalised", penalised)


def noise_is_keyed_by_the_row_of_the_block(patch):
    honest = Coupled.choices
    patch.setattr(Coupled, "choices", lambda self, p, first: honest(self, p, 0))


def only_the_last_token_of_a_block_is_looked_at(patch):
    honest = Stopping.cut

    def cut(self, sequence, new):
        last = honest(self, sequence, new[-1:])
        return Cut(len(new) - 1 + last.kept, last.reason)

    patch.setattr(Stopping, "cut", cut)


def recurrent_states_are_not_restored(patch):
    patch.setattr(RollbackCache, "restore", lambda self, snapshot: None)


def the_replay_after_a_rejection_is_forgotten(patch):
    honest = CachedModel.rollback

    def rollback(self, length):
        self._since_mark = [0] * len(self._since_mark)
        honest(self, length)

    patch.setattr(CachedModel, "rollback", rollback)


def q_belongs_to_the_next_offset(patch):
    honest = AutoregressiveDrafter.propose

    def propose(self, *args):
        proposal = honest(self, *args)
        return proposal._replace(q=[*proposal.q[-1:], *proposal.q[:-1]])

    patch.setattr(AutoregressiveDrafter, "propose", propose)


def an_update_is_merged_into_the_base(patch):
    honest = Adapter.write

    def write(self):
        honest(self)
        for lora, linear in self._pairs:
            lora.get_base_layer().weight.copy_(linear.weight)

    patch.setattr(Adapter, "write", torch.no_grad()(write))


def evidence_belongs_to_the_next_position(patch):
    honest = Evidence.add
    patch.setattr(
        Evidence, "add",
        lambda self, rows: honest(self, replace(rows, first=rows.first + 1)),
    )  # fmt: skip


def the_guard_looks_away(patch):
    patch.setattr(Coordinator, "_judge", lambda self, gain, judged: None)


def an_update_happens_inside_a_round(patch):
    """The weights change between drafting and verification, and q is computed again."""
    honest = AutoregressiveDrafter.propose

    def propose(self, sequence, *args):
        proposal = honest(self, sequence, *args)
        return proposal._replace(q=[flattened(q) for q in proposal.q])

    patch.setattr(AutoregressiveDrafter, "propose", propose)


def features_belong_to_the_next_position(patch):
    honest = FeatureDrafter._next_features
    patch.setattr(FeatureDrafter, "_next_features", lambda self, n: honest(self, n).roll(-1, 0))


def a_block_of_masks_stays_in_the_cache(patch):
    honest = DFlashDrafter._pass

    def one_pass(self, *args):
        hidden = honest(self, *args)
        self._held += self.longest + 1
        for layer in self._cache.layers:
            layer.length = self._held
        return hidden

    patch.setattr(DFlashDrafter, "_pass", one_pass)


def a_block_sees_the_blocks_beside_it(patch):
    honest = dflash_drafter.block_mask

    def block_mask(positions, keys, *args):
        mask = honest(positions, keys, *args)
        mask[..., len(keys) :] = True
        return mask

    patch.setattr(dflash_drafter, "block_mask", block_mask)


def a_window_ends_where_that_of_the_newest_block_does(patch):
    honest = dflash_drafter.block_mask

    def block_mask(positions, *args):
        return honest(positions[:, -1:].expand_as(positions).clone(), *args)

    patch.setattr(dflash_drafter, "block_mask", block_mask)


def a_chain_forgets_its_own_steps(patch):
    honest = Eagle3.unroll

    def unroll(self, *args, **kwargs):
        first, *others = honest(self, *args, **kwargs)
        return [first, *(first[:, -step.shape[1] :] for step in others)]

    patch.setattr(Eagle3, "unroll", unroll)


def a_mask_sees_the_masks_of_other_roots(patch):
    honest = torch.Tensor.__eq__
    # the only comparison of roots with roots is the one that separates them
    patch.setattr(
        torch.Tensor, "__eq__",
        lambda a, b: honest(a, b) | (a.dim() == 2 and torch.is_tensor(b) and b.dim() == 1),
    )  # fmt: skip


def the_model_is_credited_with_copies(patch):
    patch.setattr(PromptLookupDrafter, "_over", lambda self, rows, pending: rows)


def drafts_stay_known_after_they_were_judged(patch):
    honest = PromptLookupDrafter._know
    patch.setattr(PromptLookupDrafter, "_know", lambda self, *args: honest(self, *args)[:0])


def a_row_knows_what_is_said_at_it(patch):
    honest = Recall._meet

    def meet(self):
        honest(self)
        if self._count:
            self._positions -= 1

    patch.setattr(Recall, "_meet", meet)


def rejected_states_are_kept(patch):
    honest = Recall.hear

    def hear(self, logits, first):
        left = self._states.copy()
        honest(self, logits, first)
        self._states |= {p: state for p, state in left.items() if p >= first + len(logits)}

    patch.setattr(Recall, "hear", hear)


def a_row_reads_as_far_as_its_block(patch):
    patch.setattr("tts.attention.STEP", 2**20)


def few_rows_are_summed_as_they_come(patch):
    patch.setattr("tts.attention._spare_rows", lambda rows, head_dim: 0)


def halves_are_joined_by_a_softmax(patch):
    def joined(said, log_mass):
        return (said * log_mass.softmax(0)[..., None]).sum(0, keepdim=True)

    patch.setattr("tts.attention._joined", joined)


def without_architecture(check, **kwargs):
    return lambda architecture: check(**kwargs)


def rows_of_every_shape(architecture):
    """Which shapes are summed in another order depends on the CPU."""
    for heads, first in itertools.product(test_kernels.HEADS, test_kernels.FIRST):
        test_kernels.test_a_row_of_attention_is_the_same_in_every_block(heads, first, 64)


LIST = [
    (one_stale_position_survives_a_rollback, test_engine.check_greedy_equals_target, "llama3.1"),
    (the_lagging_token_is_never_fed_to_the_draft,
     test_engine.check_overlap_is_the_same_for_every_gamma, "llama3.1"),
    (the_draft_keeps_rejected_tokens,
     test_engine.check_overlap_is_the_same_for_every_gamma, "llama3.1"),
    (the_penalty_forgets_the_drafts_before_a_row,
     test_engine.check_greedy_equals_target, "llama3.1"),
    (noise_is_keyed_by_the_row_of_the_block, test_engine.check_coupled_text_is_one, "llama3.1"),
    (only_the_last_token_of_a_block_is_looked_at,
     test_engine.check_greedy_equals_target, "llama3.1"),
    (recurrent_states_are_not_restored, test_engine.check_greedy_equals_target, "qwen3.5"),
    (the_replay_after_a_rejection_is_forgotten,
     test_engine.check_greedy_equals_target, "qwen3.5"),
    (q_belongs_to_the_next_offset,
     test_engine.check_overlap_is_the_same_for_every_gamma, "llama3.1"),
    (an_update_happens_inside_a_round,
     test_engine.check_overlap_is_the_same_for_every_gamma, "llama3.1"),
    (an_update_is_merged_into_the_base,
     without_architecture(test_learning.test_base_weights_are_bit_identical_after_a_run), ""),
    (evidence_belongs_to_the_next_position,
     without_architecture(test_learning.test_the_draft_gets_better_while_it_decodes), ""),
    (the_guard_looks_away,
     without_architecture(test_learning.check_the_guard_takes_back, after=0, event="reset"), ""),
    (features_belong_to_the_next_position,
     without_architecture(test_eagle3.test_a_chain_is_what_the_formulas_say, variant={}), ""),
    (features_belong_to_the_next_position,
     without_architecture(test_dflash.test_a_block_is_what_the_formulas_say), ""),
    *((mutation, without_architecture(
        test_dflash.test_blocks_of_one_pass_are_those_of_passes_of_their_own, window=4), "")
      for mutation in (a_block_of_masks_stays_in_the_cache,
                       a_block_sees_the_blocks_beside_it,
                       a_window_ends_where_that_of_the_newest_block_does)),
    (the_model_is_credited_with_copies,
     lambda architecture: test_engine.check_one_overlap_curve(
         tiny.pair(architecture), (0, 1), 100, lookup=test_prompt_lookup.LOOKUP), "llama3.1"),
    (drafts_stay_known_after_they_were_judged,
     without_architecture(test_prompt_lookup.test_drafts_are_forgotten_once_they_are_judged), ""),
    (a_row_knows_what_is_said_at_it,
     without_architecture(test_memory.check_a_row_knows_earlier_positions_alone), ""),
    (rejected_states_are_kept,
     without_architecture(test_memory.check_a_rejected_state_is_forgotten), ""),
    *((mutation, without_architecture(
        test_drafters.check_replay, family=PAIRS[name]), "")
      for mutation, name in ((a_chain_forgets_its_own_steps, "eagle3"),
                             (a_mask_sees_the_masks_of_other_roots, "pard"))),
    *((mutation, rows_of_every_shape, "")
      for mutation in (a_row_reads_as_far_as_its_block, few_rows_are_summed_as_they_come)
      if not exact_blocks.args[0]),
    (halves_are_joined_by_a_softmax, without_architecture(
        test_kernels.test_halves_of_a_row_are_joined_alike_in_every_company), ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mutation", "check", "architecture"), LIST, ids=[m.__name__ for m, _, _ in LIST]
)
def test_a_planted_error_breaks_its_check(mutation, check, architecture, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(CRASHES.get(mutation, AssertionError)):
        check(architecture)


# what no check sees, for nothing goes on after it
CRASHES = {
    the_draft_keeps_rejected_tokens: RuntimeError,
    a_block_of_masks_stays_in_the_cache: RuntimeError,
    drafts_stay_known_after_they_were_judged: IndexError,
}
