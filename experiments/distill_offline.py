"""`tts selftext` and `tts distill-offline`: write training text, train the draft that ships."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from tts.distill.corpus import load_corpus, save_corpus
from tts.distill.offline import OfflineConfig, OfflineTrainer, Teacher, frequent_ids
from tts.distill.selftext import SelfTextConfig, write_batches
from tts.drafting import reduced
from tts.errors import UserError
from tts.models import load_target
from tts.vocabulary import fingerprint


@dataclass(frozen=True)
class SelfText:
    """Let the target write text for `tts distill-offline`.

    Args:
        out: safetensors file to write; it must not exist.
        target: alias, folder or hub id.
        dtype: bfloat16, float16 or float32.
        device: cpu or cuda.
        text: how it is sampled.
    """

    out: str = "selftext.safetensors"
    target: str = "smollm2-135m"
    dtype: str = "bfloat16"
    device: str = "cpu"
    text: SelfTextConfig = field(default_factory=SelfTextConfig)


@dataclass(frozen=True)
class DistillOffline:
    """Train an autoregressive draft from self-written text; goes on where it was stopped.

    Args:
        corpus: files of `tts selftext`.
        out: folder for the draft, its checkpoint and its log.
        target: alias, folder or hub id.
        device: cpu or cuda.
        length: tokens a sequence; longer ones are cut.
        sequences: use only so many sequences (0: all).
        training: what is trained, and for how long.
    """

    corpus: tuple[str, ...] = ("selftext.safetensors",)
    out: str = "draft"
    target: str = "smollm2-135m"
    device: str = "cpu"
    length: int = 512
    sequences: int = 0
    training: OfflineConfig = field(default_factory=OfflineConfig)


def selftext(config: SelfText) -> dict[str, object]:
    """Write the text; returns the JSON summary."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out: {out} exists: choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    target, tokenizer = load_target(config.target, dtype=config.dtype, device=config.device)
    tokens, generated = [], []
    with tqdm(total=config.text.sequences, unit="seq", desc="selftext") as bar:
        for batch, answers in write_batches(target, tokenizer, config.text):
            tokens.append(batch)
            generated.append(answers)
            bar.update(len(batch))
            # what is written survives an interruption
            save_corpus(out, torch.cat(tokens), torch.cat(generated))
    counted = torch.cat(generated)
    return {"out": str(out), "tokens": counted.numel(), "generated": int(counted.sum())}


def distill_offline(config: DistillOffline) -> dict[str, object]:
    """Train the draft; returns the last evaluation as the JSON summary."""
    folder, training = Path(config.out), config.training
    corpus = load_corpus([Path(path) for path in config.corpus], config.length)
    if config.sequences:
        corpus = corpus.select(slice(0, config.sequences))
    target, tokenizer = load_target(config.target, device=config.device)
    with tqdm(total=1.0, desc="target's hidden states", bar_format="{l_bar}{bar}") as bar:
        teacher = Teacher(target, corpus, training.temperature, lambda x: bar.update(x - bar.n))
    ids = frequent_ids(corpus, training.draft_vocab_size, [tokenizer.eos_token_id])
    draft = reduced.from_target(target, ids, list(training.layers), fingerprint(tokenizer))
    trainer = OfflineTrainer(draft, teacher, corpus, training, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    with tqdm(total=trainer.steps, initial=trainer.step, desc="training", unit="step") as bar:
        for report in trainer.run():
            bar.update(report.step - bar.n)
            bar.set_postfix(
                overlap=f"{report.overlap:.4f}", acceptance=f"{report.acceptance_length:.3f}"
            )
    return asdict(trainer.evaluate()) | {"out": str(folder)}
