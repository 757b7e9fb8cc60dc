"""One gradient step on the draft's adapter, from what the target said about committed text.

The drafter replays a window of committed tokens with its own cached keys in front, detached; the
loss compares its rows with the target's at the decoding temperature, without truncation. Only the
adapter moves. Steps happen between rounds, so the q that drafted is the q that is tested.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from tts.distill.adapter import Adapter
from tts.distill.config import DistillConfig
from tts.distill.losses import LOSSES, forward_kl, overlap
from tts.drafting.protocol import TrainableDrafter, Window
from tts.errors import UserError
from tts.evidence import Rows

SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")


def teacher_head(target: PreTrainedModel) -> torch.Tensor:
    """Weight `[vocab, hidden]` that alone makes ``target``'s logits of its hidden states.

    Raises:
        UserError: if they have a bias, a scale or a cap as well.
    """
    head: Any = target.get_output_embeddings()
    text = target.config.get_text_config()
    odd = [name for name in SCALES if getattr(text, name, None) not in (None, 1)]
    if getattr(head, "bias", None) is not None:
        odd.append("a bias of the head")
    if odd:
        raise UserError(
            f"distill: the target's logits depend on {', '.join(odd)}, which no draft learns from "
            "here: decode without learning"
        )
    weight: torch.Tensor = head.weight
    return weight


class Step(NamedTuple):
    """What a step did."""

    loss: float
    grad_norm: float
    overlap: float  # mean over the newest rows, before the step
    gain: float | None  # of the adapted draft's overlap over the bare one's, at the fresh rows
    lost_mass: float  # of the target outside the draft's vocabulary
    skipped: bool  # the loss or a gradient was not finite, and nothing moved


class Learner:
    """Trains an adapter for ``draft`` towards the rows of a target's head.

    Args:
        draft: the user's; it stays as it is.
        family: the drafter that runs it.
        head: weight of the target's language-model head `[vocab, hidden]`.
        config: how.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        family: type[TrainableDrafter],
        head: torch.Tensor,
        config: DistillConfig,
    ) -> None:
        targets = config.targets or family.targets
        layers = family.adaptable(draft) if config.layers is None else config.layers
        if config.window < family.least_rows:
            raise UserError(
                f"window: {config.window} is too short for this draft, which learns from "
                f"{family.least_rows} positions or more"
            )
        if family.shares_keys:
            _check_keys("targets", targets, family.targets)
            _check_keys("layers", layers, family.adaptable(draft))
        self.config, self._family = config, family
        self.adapter = Adapter(draft, config.rank, config.alpha, targets, layers, config.seed)
        ids = getattr(draft, "draft_ids", slice(draft.get_output_embeddings().weight.shape[0]))
        self._head, self._ids = head.detach(), ids
        self._width = len(head[ids])
        self.random = torch.Generator()
        self.reset()

    def reset(self) -> None:
        """Forget everything learned; the live weights follow with the next `Adapter.write`."""
        self.taught = False  # whether BA is not zero
        self.random.manual_seed(self.config.seed)
        self.adapter.reset()
        self.rate = self.config.learning_rate
        self._start()

    def restart(self, values: dict[str, torch.Tensor] | None) -> None:
        """Go on from these values of the adapter (None: from nothing) at half the rate."""
        self.taught = values is not None
        if values is None:
            self.adapter.reset()
        else:
            self.adapter.load(values)
        self.rate /= 2
        self._start()

    def _start(self) -> None:
        config = self.config
        self.steps = 0  # of this optimizer
        self._optimizer = torch.optim.AdamW(
            self.adapter.parameters().values(),
            self.rate,
            (config.beta1, config.beta2),
            weight_decay=0.0,
        )

    def step(
        self,
        windows: list[Window],
        temperature: float,
        bare: Sequence[torch.Tensor] = (),
        fresh: Sequence[int] = (),
    ) -> Step:
        """Learn from ``windows``, the newest first; each row counts alike.

        Args:
            windows: evidence and contexts.
            temperature: at which p and q are compared.
            bare: of the first windows, logits of the bare draft where the replay predicts position
                ``fresh`` or later, to compare with and for the proximal term (none: no comparison).
            fresh: absolute positions.
        """
        config = self.config
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.steps + 1) / max(1, config.warmup))
        with torch.enable_grad():
            losses, compared = [], []
            rows = torch.tensor([float(len(w.rows)) for w in windows], device=self._head.device)
            for window in windows:
                said = self._family.replay(self.adapter.model.get_base_model(), window)
                log_p = self.log_p(window.rows, temperature)[said.row]
                log_q = self.normalised(said.logits, temperature)
                weight = said.weight / said.weight.sum()
                losses.append(LOSSES[config.loss](log_p, log_q) @ weight)
                compared.append((said, log_p, log_q))
            loss = torch.stack(losses) @ (rows / rows.sum())
            judged = [  # which rows no step has seen, and the bare draft's q there
                (said.row >= first - window.rows.first, self.normalised(logits, temperature))
                for (said, _, _), window, first, logits in zip(
                    compared, windows, fresh, bare, strict=False
                )
            ]
            if judged and config.proximal:
                pairs = zip(compared, judged, strict=False)
                far = [forward_kl(bare_q, log_q[new]) for (_, _, log_q), (new, bare_q) in pairs]
                loss = loss + config.proximal * torch.cat(far).mean()
            loss.backward()
        norm = clip_grad_norm_(self.adapter.parameters().values(), config.clip)
        skipped = not bool(torch.isfinite(norm) & torch.isfinite(loss))
        if not skipped:
            self._optimizer.step()
            self.steps += 1
            self.taught = True
        self._optimizer.zero_grad()
        lost_mass = (1 - compared[0][1].exp().sum(-1).mean()).clamp(min=0)  # rounding
        newest = compared[: max(1, len(fresh))]
        shared, gain = [overlap(log_p, log_q.detach()) for _, log_p, log_q in newest], None
        if judged:
            won = [
                ours[new] - overlap(log_p[new], bare_q)
                for ours, (_, log_p, _), (new, bare_q) in zip(shared, newest, judged, strict=True)
            ]
            gain = float(torch.cat(won).mean())
        return Step(
            float(loss.detach()), float(norm), float(torch.cat(shared).mean()), gain,
            float(lost_mass), skipped,
        )  # fmt: skip

    def log_p(self, rows: Rows, temperature: float) -> torch.Tensor:
        """log p of the draft's ids at ``rows`` `[R, ids]`, not renormalised."""
        logits = (rows.hidden.to(self._head.dtype) @ self._head.T).float() / temperature
        return logits.log_softmax(-1)[:, self._ids]

    def normalised(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """log q `[R, ids]` of a draft's ``logits``; padding beyond the target's ids is cut off."""
        return (logits[:, : self._width].float() / temperature).log_softmax(-1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Adapter, optimizer, learning rate and random state as flat tensors."""
        state = {
            "steps": torch.tensor(self.steps),
            "taught": torch.tensor(self.taught),
            "rate": torch.tensor(self.rate, dtype=torch.float64),
            "alpha": torch.tensor(self.config.alpha, dtype=torch.float64),
            "random": self.random.get_state(),
        }
        for name, parameter in self.adapter.parameters().items():
            state[f"adapter.{name}"] = parameter.detach().clone()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value.clone()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `state_dict` gave, live weights included.

        Raises:
            UserError: if it belongs to another draft, rank or alpha.
        """
        parameters = self.adapter.parameters()
        own = {f"adapter.{name}": p.shape for name, p in parameters.items()}
        given = {k: v.shape for k, v in state.items() if k.startswith("adapter.")}
        if own != given or float(state["alpha"]) != self.config.alpha:
            raise UserError(
                "state: it belongs to another draft, rank, alpha or set of layers: load it with "
                "the settings it was saved with"
            )
        self.rate = float(state["rate"])
        self._start()
        self.steps, self.taught = int(state["steps"]), bool(state["taught"])
        self.random.set_state(state["random"])
        self.adapter.load({name: state[f"adapter.{name}"] for name in parameters})
        for name, parameter in parameters.items():
            prefix = f"optimizer.{name}."
            values = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if values:
                self._optimizer.state[parameter] = {k: v.clone() for k, v in values.items()}
        self.adapter.write()


def _check_keys(field: str, asked: Iterable[Any] | None, legal: Iterable[Any] | None) -> None:
    """Raise UserError if adapting what was asked for would leave cached keys stale."""
    if asked is not None and legal is not None:
        stale = [str(name) for name in asked if name not in legal]
        if stale:
            raise UserError(
                f"{field}: {', '.join(stale)} would leave this draft's cached keys stale: choose "
                f"from {', '.join(map(str, legal))}"
            )
