"""Compressed targets: INT8 and NF4 weights through bitsandbytes, on the CPU and on GPUs.

Every linear layer inside the body is compressed; embedding and head stay as they are loaded. A
packaged model was Q4_1 before: NF4 quantizes what that became when it was dequantized, so errors of
both add up.

Whatever a compressed target emits is its own choice, taken in the verification pass. That choice
can depend on the rows of the pass, as in bfloat16: how often is counted where a path is recorded.
"""

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from tts.errors import UserError

COMPRESSION = ("none", "int8", "nf4")
NEEDED = ("bitsandbytes", "accelerate")


def check_compression(compression: str) -> None:
    """Raise UserError for an unknown compression, or one whose package is missing."""
    if compression not in COMPRESSION:
        raise UserError(f"compression: {compression!r} is not one of {', '.join(COMPRESSION)}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if compression != "none" and missing:
        raise UserError(
            f"compression: {compression} needs {missing[0]}: run pip install {missing[0]}, or use "
            "none"
        )


def check_checkpoint(config: PreTrainedConfig, compression: str) -> None:
    """Raise UserError for weights that are quantized already where that cannot be used.

    The mixed form of INT8 keeps the columns of outliers in 16 bits and picks them over all rows of
    a pass at once: rejected drafts would change the logits of the rows before them.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if compression != "none":
        raise UserError(
            f"compression: {compression} cannot be put on weights that are quantized already: use "
            "none"
        )
    if stored.get("load_in_8bit") and stored.get("llm_int8_threshold", 6.0) > 0:
        raise UserError(
            "target: its INT8 weights are of the mixed form, in which rejected tokens change the "
            "logits of earlier ones: give the 16-bit weights and use --compression int8"
        )


def quantization(compression: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load weights as ``compression`` on ``device``.

    INT8 is used with ``llm_int8_threshold=0.0``: every row is scaled by itself and all columns are
    8-bit, so a row's logits do not depend on the rows after it (see `check_checkpoint`).
    """
    if compression == "none":
        return {}
    # it would warn at every product that INT8 computes in float16, and once of an absent kernel
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if compression == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": config, "device_map": {"": device}}


def check_layers(model: PreTrainedModel) -> None:
    """Raise UserError where the CPU kernel of NF4 would stop at the first pass."""
    for name, module in model.named_modules():
        # bitsandbytes' own mark of layers that it packs for this kind of CPU
        if getattr(module, "support_avx512bf16_for_cpu", False) and model.device.type == "cpu":
            width, height = module.in_features, module.out_features
            if width % 64 or height % 32:
                raise UserError(
                    f"compression: nf4 on this CPU needs layers of multiples of 64 x 32, {name} is "
                    f"{width} x {height}: use int8 or none"
                )
