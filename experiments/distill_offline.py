"""`tts selftext` and `tts distill-offline`: write training text, train the draft that ships."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from tts.distill.corpus import Corpus, annotate, read_tokens
from tts.distill.learner import teacher_head
from tts.distill.offline import OfflineConfig, OfflineTrainer, frequent_ids
from tts.distill.selftext import SelfTextConfig, write_shards
from tts.distill.students import (
    AutoregressiveStudent,
    DFlashStudent,
    Eagle3Student,
    PardStudent,
    Student,
)
from tts.distill.text import RecomputedText, StoredText, Text
from tts.drafting import dflash_checkpoint, dflash_start, eagle3_checkpoint, reduced
from tts.drafting.dflash_model import DFlash
from tts.drafting.eagle3_model import Eagle3
from tts.errors import UserError
from tts.models import load_pair, load_target
from tts.vocabulary import fingerprint

DRAFTERS = ("autoregressive", "pard", "eagle3", "dflash")
FEATURES = 3  # hidden states that a head reads unless they are named
ANNOTATED = 16  # sequences a shard, of text that is read


@dataclass(frozen=True)
class SelfText:
    """Let the target write text for `tts distill-offline`; run it again for more.

    Args:
        out: folder to which shards are added.
        target: alias, folder or hub id.
        dtype: bfloat16, float16 or float32.
        device: cpu or cuda.
        tokens: a file of token ids that the target wrote before; it is read instead.
        text: how the text is sampled.
    """

    out: str = "selftext"
    target: str = "smollm2-135m"
    dtype: str = "bfloat16"
    device: str = "cpu"
    tokens: str = ""
    text: SelfTextConfig = field(default_factory=SelfTextConfig)


@dataclass(frozen=True)
class DistillOffline:
    """Train a draft from self-written text; goes on where it was stopped.

    Args:
        drafter: autoregressive, pard, eagle3 or dflash.
        corpus: folders of `tts selftext` to train on.
        held_out: folder of `tts selftext` to evaluate on.
        out: folder for the draft, its checkpoint and its log.
        start: a draft that ships, or the folder of one trained here, to begin from; what a new one
            begins as is then not asked for (empty: a new one).
        target: alias, folder or hub id.
        device: cpu or cuda.
        recompute: run the target beside the training instead of reading from disk what it said: on
            a GPU, or over text that was written without its states.
        training: what is trained, and for how long.
    """

    drafter: str = "autoregressive"
    corpus: tuple[str, ...] = ("selftext",)
    held_out: str = "held-out"
    out: str = "draft"
    start: str = ""
    target: str = "smollm2-135m"
    device: str = "cpu"
    recompute: bool = False
    training: OfflineConfig = field(default_factory=OfflineConfig)

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise UserError(f"drafter: {self.drafter!r} is not one of {', '.join(DRAFTERS)}")


def selftext(config: SelfText) -> dict[str, object]:
    """Write shards; returns the JSON summary."""
    out, temperature = Path(config.out), config.text.temperature
    if config.tokens:
        tokens, counts = read_tokens(Path(config.tokens), config.text.length)
    out.mkdir(parents=True, exist_ok=True)
    target, tokenizer = load_target(config.target, dtype=config.dtype, device=config.device)
    if config.tokens:
        parts = list(zip(tokens.split(ANNOTATED), counts.split(ANNOTATED), strict=True))
        shards = (annotate(target, *part, temperature) for part in parts)
        total = len(tokens)
    else:
        shards = write_shards(target, tokenizer, config.text)
        total = config.text.sequences
    written = counted = 0
    with tqdm(total=total, unit="sequence", desc=str(out)) as bar:
        for shard in shards:
            shard.save(out, temperature)
            written += shard.tokens.numel()
            counted += len(shard.log_mass)
            bar.update(len(shard.tokens))
    return {"out": str(out), "tokens": written, "generated": counted}


def distill_offline(config: DistillOffline) -> dict[str, object]:
    """Train the draft; returns the last evaluation as the JSON summary."""
    folder, training = Path(config.out), config.training
    corpus = Corpus([Path(path) for path in config.corpus], training.temperature)
    held_out = Corpus([Path(config.held_out)], training.temperature)
    if config.start:
        target, draft = _started(config)
    else:
        target, tokenizer = load_target(config.target, device=config.device)
        teacher_head(target)
        ids = frequent_ids(corpus, training.draft_vocab_size, [tokenizer.eos_token_id])
        torch.manual_seed(training.seed)
        draft = _new(config, target, ids, fingerprint(tokenizer))
    student = _student(draft, training)
    layers: tuple[int, ...] = getattr(draft.config, "target_layers", ())
    texts: list[Text] = []
    for part in (corpus, held_out):
        if config.recompute:
            texts.append(RecomputedText(part, target, layers))
            continue
        with tqdm(total=len(part.files), desc="features", unit="shard", disable=not layers) as bar:
            texts.append(StoredText(part, target, layers, lambda: bar.update(1)))
    del target
    trainer = OfflineTrainer(student, *texts, training, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    report = None
    with tqdm(total=trainer.steps, initial=trainer.step, desc="training", unit="step") as bar:

        def on_step() -> None:
            bar.total = trainer.steps  # by the clock it is known only now
            bar.update(1)

        for report in trainer.run(on_step):
            bar.set_postfix(
                overlap=f"{report.overlap:.4f}", acceptance=f"{report.acceptance_length:.3f}"
            )
    report = report or trainer.evaluate()  # it had been trained to the end before
    return asdict(report) | {"out": str(folder)}


def _started(config: DistillOffline) -> tuple[PreTrainedModel, Any]:
    """The target, and the draft to go on from."""
    pair = load_pair(config.target, config.start, device=config.device, stock=True)
    target, draft = pair.target, pair.draft
    ids, head = getattr(draft, "draft_ids", None), teacher_head(target)
    if ids is None or not torch.equal(draft.lm_head.weight, head[ids]):
        raise UserError(
            f"start: {config.start!r} does not predict with rows of the target's head: use a draft "
            "of `tts distill-offline`"
        )
    if (drafter := _drafter(draft)) != config.drafter:
        raise UserError(f"drafter: {config.start!r} is {drafter}, not {config.drafter}: say so")
    return target, draft.requires_grad_(False)


def _new(
    config: DistillOffline, target: PreTrainedModel, ids: torch.Tensor, fingerprint: str
) -> Any:
    """A new draft of the family asked for, started from layers of the target."""
    training = config.training
    text = target.config.get_text_config()
    if config.drafter in ("pard", "dflash") and not 0 <= training.mask_token_id < text.vocab_size:
        raise UserError(
            f"mask_token_id: {training.mask_token_id} is outside the vocabulary of "
            f"{text.vocab_size}: use an id that text never holds"
        )
    if config.drafter in ("autoregressive", "pard"):
        draft = reduced.from_target(target, ids, list(training.layers), fingerprint)
        if config.drafter == "pard":
            draft.config.pard_token = training.mask_token_id
        return draft
    features = training.features or dflash_checkpoint.read_layers(FEATURES, text.num_hidden_layers)
    if config.drafter == "eagle3":
        return eagle3_checkpoint.from_target(target, ids, features, training.layers, fingerprint)
    if training.neurons > text.intermediate_size:
        raise UserError(
            f"neurons: {training.neurons} is more than the target's {text.intermediate_size}"
        )
    return dflash_start.from_target(
        target,
        ids,
        features,
        training.layers,
        training.depth + 1,
        training.mask_token_id,
        fingerprint,
        training.neurons,
    )


def _drafter(draft: Any) -> str:
    """Which of `DRAFTERS` it is."""
    if isinstance(draft, Eagle3):
        return "eagle3"
    if isinstance(draft, DFlash):
        return "dflash"
    return "autoregressive" if draft.config.pard_token is None else "pard"


def _student(draft: Any, training: OfflineConfig) -> Student:
    """How the draft is run over text."""
    match _drafter(draft):
        case "eagle3":
            return Eagle3Student(draft, training.depth, training.root_share)
        case "dflash":
            return DFlashStudent(draft, training.root_share)
        case "pard":
            return PardStudent(draft, training.depth, training.root_share)
    return AutoregressiveStudent(draft)
