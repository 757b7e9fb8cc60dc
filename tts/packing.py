"""Weights laid out for few-row products on the CPU: the same numbers, nearly twice as fast.

A bfloat16 matrix product of few rows is bound by how fast the weight can be streamed; oneDNN
otherwise rearranges the plain layout at every call. Packing is done for bfloat16 alone, where the
packed product is bit-identical to the plain one (asserted by a test), so it changes no token.
"""

import torch
from torch import nn

ROWS = 5  # the row count oneDNN lays the weight out for; others run on the same layout


def can_pack(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether packing applies: bfloat16 on a CPU on which oneDNN has bfloat16 kernels."""
    return (
        torch.device(device).type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(model: nn.Module) -> None:
    """Give every plain `nn.Linear` of ``model`` a packed copy of its weight to run on.

    The plain weight stays: embeddings may be tied to it, and gradients need it. Inference only;
    call again after writing to the weights.
    """
    for module in model.modules():
        if type(module) is nn.Linear or isinstance(module, PackedLinear):
            weight = module.weight.detach()
            if can_pack(weight.device, weight.dtype):
                module.__class__ = PackedLinear
                module.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


class PackedLinear(nn.Linear):
    """`nn.Linear` whose forward runs on ``packed`` where no gradient is asked for."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
