"""Products of few rows with bfloat16 weights on the CPU, as fast as the weights can be streamed.

PyTorch's own bfloat16 products stream the weights for one row alone: for two and more they
rearrange or reread them. FBGEMM packs a weight once, as float16, and multiplies it with float32
rows: two rows cost what one does, and a row's result is the same, bit by bit, in every company.
With `tts.attention` that makes a token's logits independent of the block it is verified in.
"""

import torch
from torch import nn

ROWS = 32  # up to which the packed product is used; many more cost less with PyTorch's own


def can_pack(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether packing applies: bfloat16 on a CPU for which FBGEMM has kernels (x86)."""
    return (
        torch.device(device).type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.quantized.engine in ("x86", "fbgemm")
    )


def pack(model: nn.Module) -> None:
    """Give every plain `nn.Linear` of ``model`` a packed copy of its weight to run on.

    The plain weight stays: embeddings may be tied to it, and gradients need it. Inference only;
    call again after writing to the weights. Weights from 2**-17 to 65,504 keep their exact value,
    smaller ones are rounded to multiples of 2**-24.
    """
    for module in model.modules():
        if type(module) is not nn.Linear and not isinstance(module, PackedLinear):
            continue
        weight = module.weight.detach()
        if can_pack(weight.device, weight.dtype):
            bias = None if module.bias is None else module.bias.detach().float()
            module.__class__ = PackedLinear
            module.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)


class PackedLinear(nn.Linear):
    """`nn.Linear` whose forward runs on ``packed`` where no gradient is asked for.

    Packing takes far longer than a product. What changes often is added as a product of two thin
    matrices ``low_rank``, float32 `[in, rank]` and `[rank, out]`.
    """

    packed: torch.ScriptObject | None  # None: another layer's holds it (`tts.lean.join`)
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        long = input.numel() > ROWS * self.in_features
        if self.packed is None or long or torch.is_grad_enabled():
            result = super().forward(input.to(self.weight.dtype))
        else:
            result = torch.ops.quantized.linear_dynamic_fp16(input.float(), self.packed)
        if self.low_rank is not None:
            down, up = self.low_rank
            thin = input.float().flatten(0, -2) @ down
            result = result.float().flatten(0, -2).addmm(thin, up).view_as(result)
        return result.to(input.dtype)
