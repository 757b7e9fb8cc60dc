"""What a decoder has learned, as one safetensors file: adapter, optimizer, guard, gamma MLP.

The file holds tensors, and JSON in its header for numbers and strings; nothing is pickled. The
adapter alone can be written in PEFT's own layout, for other programs.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tts.engine import SpeculativeDecoder
from tts.errors import UserError


def save_state(decoder: SpeculativeDecoder, file: Path | str) -> None:
    """Write everything that ``decoder`` has learned, atomically.

    Raises:
        UserError: if ``file`` cannot be written.
    """
    file = Path(file)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in _state(decoder).items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, torch.Tensor):
            tensors[name] = value.contiguous().cpu()
        else:
            numbers[name] = value
    partial = file.with_suffix(".partial")
    try:
        save_file(tensors, partial, {"numbers": json.dumps(numbers)})
    except (SafetensorError, OSError) as error:
        raise UserError(f"state: cannot write {file} ({error}): choose another place") from None
    partial.rename(file)


def load_state(decoder: SpeculativeDecoder, file: Path) -> None:
    """Take up what `save_state` wrote; the next session goes on with it under scope ``session``.

    Raises:
        UserError: a file that is missing or cut short, or one of other settings.
    """
    try:
        with safe_open(file, "pt") as stored:
            state: dict[str, Any] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            state |= json.loads(stored.metadata()["numbers"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"state: cannot read {file} ({error}): save it again") from None
    if _always(state) != _always(_state(decoder)):
        raise UserError(
            f"state: {file} was saved by another policy or without the learner: use the settings "
            "it was saved with"
        )
    if decoder.coordinator is not None:  # which may refuse it: then nothing has changed
        draft = {k.removeprefix("draft."): v for k, v in state.items() if k.startswith("draft.")}
        decoder.coordinator.load_state_dict(draft)
    policy = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    decoder.policy.load_state_dict(policy)


def save_adapter(decoder: SpeculativeDecoder, folder: Path | str) -> None:
    """Write the draft's adapter as PEFT does, for `PeftModel.from_pretrained(draft, folder)`.

    There ``draft`` is one as transformers runs it: from ``load_pair(..., stock=True)``, or its own
    `from_pretrained`. Ours multiplies joined weights, of which PEFT knows nothing.

    Raises:
        UserError: if the draft does not learn, or ``folder`` cannot be written.
    """
    if decoder.coordinator is None:
        raise UserError("adapter: this draft does not learn and has none: give the decoder distill")
    model = decoder.coordinator.learner.adapter.model
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"adapter: cannot write {folder} ({error}): choose another place") from None


def _state(decoder: SpeculativeDecoder) -> dict[str, Any]:
    state = {f"policy.{k}": v for k, v in decoder.policy.state_dict().items()}
    if decoder.coordinator is not None:
        state |= {f"draft.{k}": v for k, v in decoder.coordinator.state_dict().items()}
    return state


def _always(names: Iterable[str]) -> set[str]:
    """Without what exists only after some steps: optimizer moments and a good adapter."""
    return {name for name in names if not name.startswith(("draft.optimizer.", "draft.good."))}
