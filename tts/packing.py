"""Products of few rows with bfloat16 weights on the CPU, as fast as the weights can be streamed.

oneDNN rearranges a plain weight at every call: packed once, several rows cost half of that and the
numbers are the same, bit by bit (asserted by a test). For one and two rows its kernel is slower
than for five, and PyTorch's own, a dot product for each result, is faster: for one row by half.
That sums in another order, which changes about one result in ten thousand by its last bit.
"""

import torch
import torch.nn.functional as F
from torch import nn

DOTS = 2  # rows up to which PyTorch's own product is faster
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
        if input.numel() <= DOTS * self.in_features:
            return _dot_products(input, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def _dot_products(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # the only way to ask for PyTorch's own product
    try:
        return F.linear(input, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
