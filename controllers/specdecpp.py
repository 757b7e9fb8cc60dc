"""SpecDec++: a head on the draft's state says when a rejection is likely (arXiv 2405.19715)."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from controllers.plain import Plain
from tts.errors import UserError
from tts.policy import RoundState, Signals

BLOCKS = 3
REJECTION_WEIGHT = 6.0  # of a rejected token in the loss


class AcceptanceHead(nn.Module):
    """Acceptance of a token from the draft's state after it was fed.

    Residual blocks x + SiLU(W x + b), then two logits. In the released code the blocks are one
    module three times over; here each has weights of its own, as in the paper. The paper's label is
    min(1, p/q) of the token; under `coupled`, which we record with, it is the chance that the two
    models draw alike there, whatever the token.
    """

    def __init__(self, width: int, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.output = nn.Linear(width, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., 2]` of rejection and acceptance for states `[..., width]`."""
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        logits: torch.Tensor = self.output(hidden)
        return logits


def weighted_loss(
    logits: torch.Tensor, acceptance: torch.Tensor, weight: float = REJECTION_WEIGHT
) -> torch.Tensor:
    """Binary cross-entropy in nats with ``weight`` on the rejected share of each token.

    Args:
        logits: `[tokens, 2]` of `AcceptanceHead`.
        acceptance: `[tokens]` probability that each is accepted, given that all before it were.
    """
    log = logits.log_softmax(-1)
    rejected = weight * (1 - acceptance)
    loss = -(rejected * log[:, 0] + acceptance * log[:, 1]).sum()
    return loss / (rejected + acceptance).sum()


def optimal_threshold(draft_ms: float, verify_ms: float) -> float:
    """Probability of a rejection from which stopping is right, by the paper's theorem.

    One more draft wastes ``draft_ms`` if a token was rejected before; to stop costs another pass of
    ``verify_ms`` if none was: (c2 + D) / (c1 + c2 + D), with D, what is lost otherwise, as 0.
    """
    return verify_ms / (draft_ms + verify_ms)


class SpecDecPp(Plain):
    """Stop when 1 - prod_j alpha_j > threshold, after 2 to 20 tokens.

    alpha_j, by the head, is the acceptance of token j given all before it. The pass that feeds
    token j draws token j + 1, so the newest token is always sent unscored.

    Args:
        file: from `tts fit`.
        cap: largest gamma it plans.
        by_cost: take the threshold that follows from costs instead of the one tuned on held-out
            text.
        draft: fingerprint of the draft (`tts.fingerprint`); None: any of the head's width.

    Raises:
        UserError: a file that cannot be read, or a head that was trained for another draft.
    """

    def __init__(
        self, file: Path, cap: int = 20, by_cost: bool = False, draft: str | None = None
    ) -> None:
        super().__init__(cap)
        self.head, about = load_head(file)
        if draft is not None and about["draft"] != draft:
            raise UserError(
                f"weights: {file.name} was trained for another draft than this one: fit a head for "
                "it with `tts fit`"
            )
        self.threshold = float(about["by_cost" if by_cost else "tuned"])
        self._all_accepted = 1.0  # probability, of the scored tokens of this round

    @torch.inference_mode()
    def proceed(self, state: RoundState, signals: Signals) -> bool:
        if signals.offset == 0:
            self._all_accepted = 1.0
            return True
        self._all_accepted *= self.score(signals)
        return 1 - self._all_accepted <= self.threshold

    def score(self, signals: Signals) -> float:
        """Acceptance of the token before the newest one, by the head."""
        width = self.head.output.in_features
        if signals.hidden is None or signals.hidden.shape[-1] != width:
            raise UserError(
                f"policy: specdecpp reads draft states of width {width}, this draft has none "
                "such: fit a head for it with `tts fit`, or use another policy"
            )
        hidden = signals.hidden.to(self.head.output.weight)
        return float(self.head(hidden).softmax(-1)[1])


def save_head(
    head: AcceptanceHead, file: Path, *, draft: str, tuned: float, by_cost: float
) -> None:
    """Write weights in bfloat16, the draft's fingerprint and both thresholds."""
    tensors = {name: value.bfloat16().contiguous() for name, value in head.state_dict().items()}
    about = {"draft": draft, "tuned": repr(tuned), "by_cost": repr(by_cost)}
    save_file(tensors, file, about)


def load_head(file: Path) -> tuple[AcceptanceHead, dict[str, Any]]:
    """The head in float32 and what is written beside it.

    Raises:
        UserError: for a file that `save_head` did not write.
    """
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
            about = stored.metadata()
        blocks = sum(name.endswith("weight") for name in tensors) - 1
        head = AcceptanceHead(tensors["output.weight"].shape[1], blocks)
        head.load_state_dict(tensors)
        float(about["tuned"]), float(about["by_cost"]), about["draft"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"weights: {file} holds no acceptance head ({reason}): write it with `tts fit`"
        ) from None
    return head.eval().requires_grad_(False), about
