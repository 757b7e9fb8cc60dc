"""Distances between the target's p and the draft's q, one definition each, for all training.

Speculative decoding accepts a token with probability sum_x min(p(x), q(x)) = 1 - TV(p, q), so that
overlap is what training should raise. Forward KL covers all of p's mass and flattens q, which can
lower the overlap while the loss falls.

Every function takes log-probabilities over the same ids and returns one value a row. Where the
draft predicts only some ids, ``log_p`` is the target's over those ids, not renormalised: its mass
may be below one, and the missing mass is overlap that no draft can win.
"""

from collections.abc import Callable
from typing import Any

import torch

FLOOR = 1e-6  # keeps the logarithm of an empty overlap, and its gradient, finite

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def overlap(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum_x min(p, q), the acceptance probability: `[..., ids]` to `[...]`.

    Differentiable in ``log_q`` alone.
    """
    return _Overlap.apply(log_p, log_q)  # type: ignore[no-any-return]


class _Overlap(torch.autograd.Function):
    """As a function of its own it reads and writes the wide rows half as often."""

    @staticmethod
    def forward(ctx: Any, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(log_p, log_q)
        return torch.minimum(log_p, log_q).exp_().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        log_p, log_q = ctx.saved_tensors
        return None, log_q.exp().masked_fill_(log_q > log_p, 0.0).mul_(grad[..., None])


def overlap_loss(log_weight: float) -> Loss:
    """(1 - overlap) + ``log_weight`` * (-log overlap).

    The logarithm keeps gradients alive where the overlap is small; the linear term is the
    acceptance itself.
    """

    def loss(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        shared = overlap(log_p, log_q)
        return (1 - shared) - log_weight * (shared + FLOOR).log()

    return loss


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) with p renormalised over the ids both predict."""
    log_p = log_p.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(q || p) with p renormalised over the ids both predict."""
    log_p = log_p.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of q and the renormalised p."""
    log_p = log_p.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1))


LOSSES: dict[str, Loss] = {
    "overlap": overlap_loss(0.3),
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}
