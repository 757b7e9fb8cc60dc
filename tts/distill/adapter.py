"""LoRA on the draft, and the live copy that drafts with it.

Three models share every tensor that is not adapted: the user's draft, which never changes; PEFT's
view of it, which is trained; and the live copy, whose adapted weights become base + BA after an
update: BA is added to each product of a packed weight, other weights are rewritten. Nothing is ever
merged and unmerged, which would change the base in bfloat16, and the live copy drafts at the speed
of the plain draft.
"""

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from tts.errors import UserError
from tts.lean import join_low_rank, separate
from tts.packing import PackedLinear

NAME = "default"


class Adapter:
    """A LoRA adapter on ``draft`` and the live copy that has its weights.

    Args:
        draft: stays bit-identical.
        rank: of the adapter.
        alpha: scaling is alpha / rank.
        targets: names of the linear layers that are adapted.
        layers: indices of the decoder layers that are adapted (None: all).
        seed: of the random half of the adapter.

    Raises:
        UserError: if no layer matches.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        rank: int,
        alpha: float,
        targets: tuple[str, ...],
        layers: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        chosen = _linears(draft, targets, layers)
        if not chosen:
            raise UserError(
                f"targets, layers: the draft has no {', '.join(targets)} there: name its own layers"
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=chosen,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
            torch.manual_seed(seed)
            bare = shared_copy(draft)
            for module in bare.modules():
                separate(module)
            self.model: PeftModel = get_peft_model(bare, config)
        self._initial = {k: v.detach().clone() for k, v in self.parameters().items()}
        adapted = [
            (name.removeprefix("base_model.model."), module)
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLinear)
        ]
        self.live = shared_copy(draft)
        self._pairs: list[tuple[LoraLinear, nn.Linear]] = []
        for name, module in adapted:
            linear = self.live.get_submodule(name)
            if not isinstance(linear, PackedLinear):
                separate(self.live.get_submodule(name.rpartition(".")[0]))
                linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            self._pairs.append((module, linear))
        self.version = 0  # how often the live weights changed

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name: A and B of every adapted layer, float32."""
        return {k: p for k, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def write(self) -> None:
        """Make the live weights base + BA."""
        for lora, linear in self._pairs:
            if isinstance(linear, PackedLinear):
                down: torch.Tensor = lora.lora_A[NAME].weight  # type: ignore[assignment]
                up: torch.Tensor = lora.lora_B[NAME].weight  # type: ignore[assignment]
                linear.low_rank = down.T.clone(), up.T.mul(lora.scaling[NAME])
            else:
                base: torch.Tensor = lora.get_base_layer().weight  # type: ignore[assignment]
                delta: torch.Tensor = lora.get_delta_weight(NAME)
                linear.weight.copy_(base.float() + delta.float())
        for module in self.live.modules():
            join_low_rank(module)
        self.version += 1

    @torch.no_grad()
    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Take up values of `parameters`; the live weights follow with the next `write`."""
        for name, parameter in self.parameters().items():
            parameter.copy_(values[name])

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of all trained values."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def reset(self) -> None:
        """Back to the start: BA = 0."""
        self.load(self._initial)


def _linears(
    model: PreTrainedModel, targets: tuple[str, ...], layers: tuple[int, ...] | None
) -> list[str]:
    """Full names of the linear layers called as one of ``targets``, in these decoder layers."""
    chosen = []
    for name, module in model.named_modules():
        *path, last = name.split(".")
        inside = layers is None or any(part.isdigit() and int(part) in layers for part in path)
        if isinstance(module, nn.Linear) and last in targets and inside:
            chosen.append(name)
    return chosen


def shared_copy(model: PreTrainedModel) -> Any:
    """A module tree of its own over the same parameters, buffers and packed weights."""
    modules = list(model.modules())
    modules += [held for module in modules if (held := vars(module).get("joint")) is not None]
    held = [t for m in modules for t in (*m.parameters(), *m.buffers(), vars(m).get("packed"))]
    return copy.deepcopy(model, {id(x): x for x in held if x is not None})
