"""What `target.generate(ids, custom_generate=decoder)` hands over, and what of it is honoured."""

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
)

from tts.errors import UserError

# model inputs that follow from input_ids and the decoder's own caches
_IMPLIED = {"use_cache", "logits_to_keep", "cache_position"}


def check_handover(
    target: PreTrainedModel,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse by name whatever would otherwise be ignored.

    Raises:
        UserError: another model than the decoder's target, padding, positions other than 0, 1, ...,
            a filled cache, a logits processor that does not come from ``config``, or an unknown
            model input.
    """
    if model is not target:
        raise UserError("custom_generate: the decoder was made for another target: make a new one")
    mask = kwargs.pop("attention_mask", None)
    if mask is not None and not bool((mask == 1).all()):
        raise UserError("attention_mask: padding cannot be honoured: decode one sequence at a time")
    places = kwargs.pop("position_ids", None)
    if places is not None and places.flatten().tolist() != list(range(input_ids.shape[1])):
        raise UserError("position_ids: only 0, 1, 2, ... can be honoured: leave them out")
    cache = kwargs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError(
            "past_key_values: a filled cache cannot be taken over: use decoder.session() to go on"
        )
    for name, value in kwargs.items():
        if value is not None and name not in _IMPLIED:
            raise UserError(f"{name}: not supported by speculative decoding: leave it out")
    expected = target._get_logits_processor(
        generation_config=config, input_ids_seq_length=input_ids.shape[1], device=input_ids.device
    )
    for processor in processors or []:
        twins = [twin for twin in expected if type(twin) is type(processor)]
        if not any(_same(twin, processor) for twin in twins):
            raise UserError(
                f"logits_processor: {type(processor).__name__} cannot be honoured row by row: use "
                "the fields of GenerationConfig"
            )


def own_criteria(
    criteria: StoppingCriteriaList | None, config: GenerationConfig
) -> StoppingCriteriaList:
    """The criteria that do not come from fields of ``config``, which are honoured as such."""
    eos = config.eos_token_id
    ids = {eos} if eos is None or isinstance(eos, int) else set(eos)

    def repeats(criterion: Any) -> bool:
        match criterion:
            case MaxLengthCriteria():
                return bool(criterion.max_length == config.max_length)
            case MaxTimeCriteria():
                return bool(criterion.max_time == config.max_time)
            case EosTokenCriteria():
                return set(criterion.eos_token_id.tolist()) == ids
        return False

    return StoppingCriteriaList(c for c in criteria or [] if not repeats(c))


def _same(a: Any, b: Any) -> bool:
    """Whether two processors of one class have equal parameters."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return {k: plain(v) for k, v in vars(a).items()} == {k: plain(v) for k, v in vars(b).items()}
