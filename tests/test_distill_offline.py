"""Self-written text, the corpus and the offline trainer, on a tiny model."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.heads import Recorded
from tts.distill import losses, offline
from tts.distill.corpus import Corpus, annotate, read_tokens
from tts.distill.offline import OfflineConfig, OfflineTrainer, frequent_ids
from tts.distill.selftext import SelfTextConfig, write_shards
from tts.distill.students import (
    AutoregressiveStudent,
    DFlashStudent,
    Eagle3Student,
    PardStudent,
)
from tts.distill.text import RecomputedText, StoredText
from tts.drafting import dflash_start, eagle3_checkpoint, make_drafter, reduced
from tts.drafting.checkpoint import read_config
from tts.errors import UserError

TEMPERATURE = 0.8
TEXT = SelfTextConfig(
    sequences=24, length=48, batch_size=8, max_user=4, max_answer=12, temperature=TEMPERATURE
)


@pytest.fixture(scope="module")
def target():
    return tiny.model("llama3.1")


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for shard in write_shards(target, tiny.tokenizer(), TEXT):
        shard.save(root / "train", TEMPERATURE)
    for shard in write_shards(target, tiny.tokenizer(), SelfTextConfig(
        sequences=8, length=48, max_user=4, max_answer=12, seed=9
    )):  # fmt: skip
        shard.save(root / "held-out", TEMPERATURE)
    return root


def test_text_alternates_turns_and_counts_answers_only(folder):
    corpus = Corpus([folder / "train"], TEMPERATURE)
    assert corpus.tokens.shape == (24, 48)
    for tokens, counts in zip(corpus.tokens.tolist(), corpus.counts.tolist(), strict=True):
        is_user, inside = False, False
        assert tokens[0] == 0  # "<" opens a user turn, ">" an answer, id 63 ends either
        for token, counted in zip(tokens, [False, *counts], strict=True):
            if token == 0 and not inside:
                is_user, inside = True, True
            elif token == 1 and not inside:
                is_user, inside = False, True
            elif inside:
                assert counted == (not is_user)
                inside = token != 63


def test_cached_hidden_states_are_those_of_a_fresh_pass(target, folder):
    corpus = Corpus([folder / "train"], TEMPERATURE)
    picked = torch.tensor([17, 2])
    hidden, log_mass = StoredText(corpus).teacher(picked)
    fresh = annotate(target, corpus.tokens[picked], corpus.counts[picked], TEMPERATURE)
    torch.testing.assert_close(hidden, fresh.hidden, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(log_mass, fresh.log_mass, atol=1e-4, rtol=1e-3)


def test_a_token_file_is_read_and_cut(tmp_path):
    save_file(
        {
            "tokens": torch.tensor([5, 6, 7, 8, 9, 1, 2], dtype=torch.uint16),
            "offsets": torch.tensor([0, 5, 7]),
            "assistant_start": torch.tensor([2, 1], dtype=torch.int32),
        },
        tmp_path / "t.safetensors",
    )
    tokens, counts = read_tokens(tmp_path / "t.safetensors", 4)
    assert tokens.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert counts.tolist() == [[False, True, True], [True, False, False]]


def make_trainer(target, folder, out, **kwargs):
    kwargs = {"visits": 48 * 8 * 30, "batch_size": 8, "every": 10, "warmup": 3} | kwargs
    config = OfflineConfig(layers=(0,), draft_vocab_size=60, **kwargs)
    corpus = Corpus([folder / "train"], TEMPERATURE)
    draft = reduced.from_target(target, frequent_ids(corpus, 60, [63]), [0], "f")
    held_out = Corpus([folder / "held-out"], TEMPERATURE)
    student = AutoregressiveStudent(draft)
    return OfflineTrainer(student, StoredText(corpus), StoredText(held_out), config, out)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_training_raises_the_held_out_overlap_with_every_loss(target, folder, tmp_path, loss):
    trainer = make_trainer(target, folder, tmp_path, loss=loss, warm_share=0.0)
    before = trainer.evaluate()
    *_, after = trainer.run()
    assert after.overlap > before.overlap + 0.02
    assert after.acceptance_length > before.acceptance_length
    lines = (tmp_path / "training.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == trainer.steps == 30


def test_the_frozen_parts_do_not_move(target, folder, tmp_path):
    before = {name: value.clone() for name, value in target.state_dict().items()}
    trainer = make_trainer(target, folder, tmp_path)
    for _ in trainer.run():
        pass
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())
    config = reduced.configure(read_config(tmp_path / "config.json"), target.config, tmp_path)
    loaded = reduced.load(tmp_path, config, target)
    assert torch.equal(loaded.model.embed_tokens.weight, target.model.embed_tokens.weight)


def test_a_resumed_training_ends_where_an_unbroken_one_does(target, folder, tmp_path):
    whole = make_trainer(target, folder, tmp_path / "whole")
    *_, expected = whole.run()
    broken = make_trainer(target, folder, tmp_path / "broken")
    for report in broken.run():
        if report.step == 20:
            break
    resumed = make_trainer(target, folder, tmp_path / "broken")
    assert resumed.step == 20
    *_, got = resumed.run()
    assert got.overlap == pytest.approx(expected.overlap, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"loss": "mse"}, "loss: 'mse'"), ({"visits": 0}, "visits: 0"),
     ({"learning_rate": float("nan")}, "learning_rate"), ({"warm_share": 2.0}, "warm_share"),
     ({"neurons": -1}, "neurons"), ({"seconds": -1.0}, "seconds")],
)  # fmt: skip
def test_bad_training_options_are_refused_by_name(fields, match):
    with pytest.raises(UserError, match=match):
        OfflineConfig(**fields)


def test_bad_corpora_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no shards"):
        Corpus([tmp_path], TEMPERATURE)
    with pytest.raises(UserError, match="temperature"):
        Corpus([folder / "train"], 0.5)
    (tmp_path / "00000.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="damaged"):
        Corpus([tmp_path], TEMPERATURE)
    with pytest.raises(UserError, match="no file"):
        read_tokens(tmp_path / "x", 4)


def test_losses_by_hand():
    log_p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    log_q = torch.tensor([[0.2, 0.3, 0.5]]).log()
    assert losses.overlap(log_p, log_q).item() == pytest.approx(0.7)
    kl = 0.5 * torch.tensor(2.5).log() + 0.2 * torch.tensor(0.4).log()
    assert losses.forward_kl(log_p, log_q).item() == pytest.approx(kl.item(), abs=1e-6)
    assert losses.reverse_kl(log_p, log_q).item() == pytest.approx(kl.item(), abs=1e-6)
    mixture = losses.overlap_loss(0.3)(log_p, log_q).item()
    assert mixture == pytest.approx(0.3 - 0.3 * torch.tensor(0.7).log().item(), abs=1e-4)
    assert losses.jsd(log_p, log_q).item() == pytest.approx(
        losses.jsd(log_q, log_p).item(), abs=1e-6
    )
    for loss in losses.LOSSES.values():
        assert loss(log_p, log_p).item() == pytest.approx(0, abs=1e-5)


def test_the_gradient_of_the_overlap_is_that_of_its_formula():
    torch.manual_seed(0)
    log_p, x = torch.randn(2, 5, 40).log_softmax(-1) - 0.1
    x.requires_grad_(True)
    weight = torch.rand(5)
    (expected,) = torch.autograd.grad(
        torch.minimum(log_p, x.log_softmax(-1)).exp().sum(-1) @ weight, x
    )
    (got,) = torch.autograd.grad(losses.overlap(log_p, x.log_softmax(-1)) @ weight, x)
    torch.testing.assert_close(got, expected)
    assert expected.abs().max() > 0.01


def test_missing_mass_is_lost_overlap_but_no_loss_of_a_divergence():
    whole = torch.tensor([[0.4, 0.4, 0.2]])
    kept = whole[:, :2].log()
    log_q = torch.tensor([[0.5, 0.5]]).log()
    assert losses.overlap(kept, log_q).item() == pytest.approx(0.8)
    assert losses.forward_kl(kept, log_q).item() == pytest.approx(0, abs=1e-6)


def parallel(target, ids):
    draft = reduced.from_target(target, ids, [1], "")
    draft.config.pard_token = 62
    return PardStudent(draft, depths=4, share=0.4)


HEADS = {
    "pard": parallel,
    "eagle3": lambda target, ids: Eagle3Student(
        eagle3_checkpoint.from_target(target, ids, (0, 1, 2), (0, 1), ""), depths=4, share=0.5
    ),
    "dflash": lambda target, ids: DFlashStudent(
        dflash_start.from_target(target, ids, (0, 1, 2), (0, 1), 5, 62, ""), share=0.4
    ),
}


@pytest.fixture(params=HEADS)
def head(request, target, folder):
    """A student that reads the target, and its text with features."""
    corpus = Corpus([folder / "train"], TEMPERATURE)
    held_out = Corpus([folder / "held-out"], TEMPERATURE)
    texts = [StoredText(part, target, (0, 1, 2)) for part in (corpus, held_out)]
    torch.manual_seed(0)
    return HEADS[request.param](target, frequent_ids(corpus, 60, [62, 63])), texts


def test_training_a_head_raises_its_held_out_acceptance_and_is_resumed(head, tmp_path, target):
    student, texts = head
    before = {name: value.clone() for name, value in target.state_dict().items()}
    config = OfflineConfig(
        draft_vocab_size=60, visits=48 * 8 * 30, batch_size=8, every=10, warmup=3, warm_share=0.0
    )
    trainer = OfflineTrainer(student, *texts, config, tmp_path)
    start = trainer.evaluate()
    *_, end = trainer.run()
    assert end.overlap > start.overlap + 0.02
    assert end.acceptance_length > start.acceptance_length
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())
    again = OfflineTrainer(student, *texts, config, tmp_path)
    assert again.step == trainer.steps == 30


def test_features_are_kept_beside_the_shards_and_are_the_targets_states(head, target):
    _, (text, _) = head
    batch = torch.tensor([3, 1])
    features = text.features(batch)
    again = StoredText(text.corpus, None, (0, 1, 2))  # nothing is left to run
    assert torch.equal(again.features(batch), features)
    tokens = text.corpus.tokens[batch][:, : features.shape[1]]
    states = target(tokens, output_hidden_states=True).hidden_states
    for row, length in enumerate(text.corpus.lengths[i] for i in batch.tolist()):
        expected = torch.cat([states[i][row, :length] for i in (0, 1, 2)], -1)
        torch.testing.assert_close(features[row, :length].float(), expected, atol=2e-2, rtol=2e-2)


def test_a_recomputed_text_says_what_a_stored_one_does(head, target, folder, tmp_path):
    _, (text, _) = head
    for shard in write_shards(target, tiny.tokenizer(), replace(TEXT, states=False)):
        shard.save(tmp_path, TEMPERATURE)
    bare = Corpus([tmp_path], TEMPERATURE)
    again = RecomputedText(bare, target, (0, 1, 2))
    for batch in (torch.tensor([3, 1]), torch.tensor([0, 20])):
        for mine, stored, sequence in zip(
            again.features(batch), text.features(batch), batch.tolist(), strict=True
        ):
            rows = slice(bare.lengths[sequence])  # behind them anything may stand
            torch.testing.assert_close(
                mine[rows].to(torch.bfloat16), stored[rows], atol=2e-2, rtol=2e-2
            )
        for mine, stored in zip(again.teacher(batch), text.teacher(batch), strict=True):
            torch.testing.assert_close(mine, stored, atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match="written without states"):
        StoredText(bare).teacher(batch)


def test_the_clock_may_decide_how_long_training_takes(target, folder, tmp_path, monkeypatch):
    trainer = make_trainer(target, folder, tmp_path, visits=1, seconds=60.0)
    monkeypatch.setattr(offline.time, "perf_counter", itertools.count(step=5.0).__next__)
    *_, end = trainer.run()
    assert end.step == trainer.steps == 12
    rates = [offline._cosine(step, 12, 3) for step in (2, 11)]
    assert trainer._optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * rates[1])
    assert rates[1] < 0.1 < rates[0]


def test_a_student_predicts_what_its_drafter_drafts(head, monkeypatch):
    """The row of counted position t is the drafter's row for token t + 1."""
    student, (text, _) = head
    stored = StoredText.features
    monkeypatch.setattr(StoredText, "features", lambda self, batch: stored(self, batch).float())
    model = student.model.float().eval()
    with torch.no_grad():
        rows = student.predict(text, torch.tensor([2]))
        logits = model.lm_head(rows.hidden)
    tokens = text.corpus.tokens[2].tolist()
    features = text.features(torch.tensor([2]))[0]
    compared = 0
    # a chain reads its own drafts, which text does not hold; a block has only its root
    depths = 1 if isinstance(student, Eagle3Student) else 3
    compared = [0] * depths
    for depth in range(depths):
        for position in range(8, text.corpus.lengths[2]):
            here, root = (rows.position == position) & (rows.depth == depth), position - depth
            if here.any():
                drafter = make_drafter(model, 64)
                said = Recorded(drafter)
                drafter.prefill(tokens[:root], features[: root - 1])
                drafter.commit(root + 1, features[root - 1 : root])
                said.propose(tokens[: root + 1], depth + 1)
                torch.testing.assert_close(
                    said.logits[-1][0], logits[here][0], atol=1e-3, rtol=1e-3
                )
                compared[depth] += 1
    assert min(compared) >= 3
