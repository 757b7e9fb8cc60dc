"""Pieces of a decoder layer in few operations: the same numbers, with less around the products.

At one to five rows the small operations between the matrix products, and the Python that calls
them, take as long as the products. Here linear layers that read the same rows are one product,
rotations are looked up instead of computed, and queries and keys are rotated together. Each piece
is bit-identical to transformers' own (asserted by a test).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tts.packing import PackedLinear, pack

TABLE = 1024  # positions whose rotations are computed at a time
CHANGING = ("dynamic", "longrope")  # rotations that depend on the length of the context

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines [batch or 1, 1, rows, dim]


def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    """RMSNorm with the weight of ``module``."""
    return module.weight * F.rms_norm(x, x.shape[-1:], None, module.variance_epsilon)


def rotation(rotary: Any, like: torch.Tensor, positions: range | torch.Tensor) -> Rotation:
    """Rotary embedding of ``positions``, consecutive or int64 `[batch, rows]`.

    Args:
        rotary: transformers' module; the table is kept beside it.
        like: of the dtype and device that is wanted.
        positions: see above.
    """
    if rotary.rope_type in CHANGING:
        if isinstance(positions, range):
            positions = torch.arange(positions.start, positions.stop)[None]
        return _computed(rotary, like, positions.to(like.device))
    end = positions.stop if isinstance(positions, range) else int(positions.max()) + 1
    table: Rotation | None = rotary.__dict__.get("table")
    if table is None or table[0].shape[2] < end or table[0].dtype != like.dtype:
        whole = torch.arange(-(-end // TABLE) * TABLE, device=like.device)[None]
        with torch.inference_mode(False), torch.no_grad():
            table = rotary.__dict__["table"] = _computed(rotary, like.detach(), whole)
    cos, sin = table
    if isinstance(positions, range):
        return cos[:, :, positions.start : end], sin[:, :, positions.start : end]
    where = positions.to(cos.device)
    return cos[0, 0, where][:, None], sin[0, 0, where][:, None]


def _computed(rotary: Any, like: torch.Tensor, positions: torch.Tensor) -> Rotation:
    cos, sin = rotary(like, positions)
    half = sin.shape[-1] // 2
    return cos[:, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, None]


def turned(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """``x`` `[batch, heads, rows, dim]` rotated."""
    cos, sin = by
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def join(module: Any, *names: str) -> None:
    """Let linear layers of ``module`` be multiplied as one, where `joint` is asked for them.

    Their weights become parts of one matrix; what is compressed or has a bias is left alone.
    """
    parts = [module.get_submodule(name) for name in names]
    if any(type(x) not in (nn.Linear, PackedLinear) or x.bias is not None for x in parts):
        return
    widths = [x.out_features for x in parts]
    whole = nn.Linear(parts[0].in_features, sum(widths), bias=False, device="meta")
    weight = torch.cat([x.weight for x in parts]).detach()
    whole.weight = nn.Parameter(weight, requires_grad=False)
    pack(whole)
    for part, rows in zip(parts, weight.split(widths), strict=True):
        part.weight = nn.Parameter(rows, requires_grad=False)
        if isinstance(part, PackedLinear):
            part.packed = None  # the whole's is enough
    whole.__dict__["names"] = names
    module.__dict__["joint"] = whole  # no module of the tree: it holds nothing of its own


def separate(module: nn.Module) -> None:
    """Undo `join`: each layer is multiplied by itself again, with whatever weight it has."""
    module.__dict__.pop("joint", None)


def joint(module: Any, x: torch.Tensor, *names: str) -> torch.Tensor:
    """The products of ``x`` with the linear layers ``names`` of ``module``, side by side."""
    whole = module.__dict__.get("joint")
    if whole is None or torch.is_grad_enabled():
        return torch.cat([getattr(module, name)(x) for name in names], -1)
    result: torch.Tensor = whole(x)
    return result


def join_low_rank(module: Any) -> None:
    """Let the joined product of ``module`` add what its packed layers add by now, as one."""
    whole = module.__dict__.get("joint")
    if not isinstance(whole, PackedLinear):
        return
    parts: list[Any] = [getattr(module, name) for name in vars(whole)["names"]]
    thin = [
        part.low_rank or (torch.zeros(part.in_features, 0), torch.zeros(0, part.out_features))
        for part in parts
    ]
    if any(part.low_rank for part in parts):
        whole.low_rank = torch.cat([a for a, _ in thin], 1), torch.block_diag(*(b for _, b in thin))


def swiglu(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The MLP ``module`` of Llama's and Qwen3's layers."""
    gate, up = joint(module, x, "gate_proj", "up_proj").chunk(2, -1)
    result: torch.Tensor = module.down_proj(module.act_fn(gate) * up)
    return result
