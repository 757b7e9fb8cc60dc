"""A second device in software: its tensors name another device, compute on the CPU, refuse to mix.

Tests run where no GPU is. What breaks on one is nearly always a tensor that was left behind, and
that shows here: an operation on tensors of both devices raises, as it would there, and so does
reading a tensor as an array without fetching it first.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy:0")  # PyTorch knows the name, differentiates there, and has no kernels
CPU = torch.device("cpu")

aten = torch.ops.aten
MOVES = (aten._to_copy, aten.to, aten.copy_)
TAKES_INDICES_OF_THE_CPU = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl)


class There(torch.Tensor):
    """A tensor on `DEVICE`."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "There":
        with torch.inference_mode(False):  # views of what was made before the mode need a version
            return torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                dtype=held.dtype, layout=held.layout, device=DEVICE,
            )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a tensor on {DEVICE} is no array: fetch it first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})


class SecondDevice(TorchFunctionMode):
    """While it is entered, `DEVICE` exists."""

    def __enter__(self) -> "SecondDevice":
        self._dispatch = _Dispatch()
        self._dispatch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._dispatch.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and "device" in kwargs:  # it is not dispatched
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _run(op: Any, args: Any, kwargs: Any) -> Any:
    """``op`` on the CPU; its result is on the device that was named, else on that of its inputs."""
    leaves = tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, There)]
    here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, There)]
    named = [x for x in leaves if isinstance(x, torch.device)]
    packet = op.overloadpacket
    if there and packet not in MOVES + TAKES_INDICES_OF_THE_CPU and any(x.dim() for x in here):
        raise RuntimeError(f"{op}: expected all tensors on one device, found cpu and {DEVICE}")
    plain = tree_map_only(There, lambda x: x.held, (args, kwargs))
    plain_args, plain_kwargs = tree_map_only(torch.device, lambda device: CPU, plain)
    result = op(*plain_args, **plain_kwargs)
    if op._schema.is_mutable:
        return None if result is None else args[0]
    if not (named[0] == DEVICE if named else there):
        return result
    if plain_args and result is plain_args[0]:  # moved here, to where it computes anyway
        result = result.clone()
    return tree_map_only(torch.Tensor, There, result)
