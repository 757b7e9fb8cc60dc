"""What transformers' GenerationConfig asks for, resolved and checked once, before decoding."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from tts.errors import UserError

# Fields that Sampling and Limits below honour.
_HONOURED = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "suppress_tokens", "begin_suppress_tokens", "eos_token_id",
}  # fmt: skip
# Fields that cannot change a token of batch-1 decoding with a cache.
_HARMLESS = {
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "early_stopping", "length_penalty", "renormalize_logits",
    "return_dict_in_generate", "compile_config", "disable_compile", "prefill_chunk_size",
    "low_memory", "is_assistant", "transformers_version", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind",
}  # fmt: skip

COLDEST = 1e-30  # a temperature below it is greedy: logits over it are no numbers


@dataclass(frozen=True, slots=True)
class Sampling:
    """Everything that shapes a distribution. ``temperature`` 0 means greedy."""

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        def check(field: str, holds: bool, legal: str) -> None:
            if not holds:
                raise UserError(f"{field}: {getattr(self, field)} is not {legal}")

        check("temperature", 0 <= self.temperature < float("inf"), "a number from 0 (greedy) up")
        check("top_k", self.top_k >= 0, "a count from 0 (off) up")
        check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        check("repetition_penalty", self.repetition_penalty > 0, "positive")

    @property
    def truncates(self) -> bool:
        """Whether any of top-k, top-p, min-p is on."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Everything that ends a generation."""

    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    max_time: float | None = None  # seconds


def resolve(
    model: PreTrainedModel, config: GenerationConfig | None, prompt_length: int
) -> tuple[Sampling, Limits]:
    """Fill unset fields as ``model.generate`` would and refuse what is not honoured.

    Unset fields come from the model's own generation config, then from transformers' defaults; so
    an unset ``top_k`` is 50 when sampling.

    Raises:
        UserError: naming a field that is set and cannot be honoured row by row, or a bad value.
    """
    if not isinstance(config, GenerationConfig | None):
        raise UserError(
            f"generation_config: a {type(config).__name__} is none: give a GenerationConfig"
        )
    if config is not None and config.temperature is not None and config.temperature < 0:
        raise UserError(
            f"temperature: {config.temperature} is negative: use 0 for greedy or a positive number"
        )
    try:
        resolved, _ = model._prepare_generation_config(config)
    except ValueError as error:
        raise UserError(f"generation_config: {error}") from None
    _refuse_unknown(resolved)
    sampled = resolved.do_sample and resolved.temperature > COLDEST
    eos = resolved.eos_token_id
    sampling = Sampling(
        temperature=float(resolved.temperature) if sampled else 0.0,
        top_k=int(resolved.top_k or 0),
        top_p=1.0 if resolved.top_p is None else float(resolved.top_p),
        min_p=float(resolved.min_p or 0.0),
        repetition_penalty=float(resolved.repetition_penalty or 1.0),
        suppress_tokens=tuple(resolved.suppress_tokens or ()),
        begin_suppress_tokens=tuple(resolved.begin_suppress_tokens or ()),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        min_new_tokens=resolved.min_new_tokens
        if resolved.min_new_tokens is not None
        else max(0, (resolved.min_length or 0) - prompt_length),
    )
    new, given = resolved.max_new_tokens, "max_new_tokens"
    if new is None:
        given = "max_length"
        unset = config is None or config.max_length is None
        unset = unset and model.generation_config.max_length is None
        # transformers counts its default of 20 from the end of the prompt
        new = resolved.max_length if unset else resolved.max_length - prompt_length
    if not isinstance(new, int) or new < 1:
        raise UserError(
            f"{given}: it leaves {new} tokens to generate: use a whole number, 1 at least"
        )
    stop = resolved.stop_strings or ()
    return sampling, Limits(
        new, (stop,) if isinstance(stop, str) else tuple(stop), resolved.max_time
    )


def _refuse_unknown(config: GenerationConfig) -> None:
    """Every other field must have the value that it has when nobody sets it."""
    defaults: dict[str, Any] = GenerationConfig().to_dict()
    defaults |= GenerationConfig._get_default_generation_params()
    for field, value in config.to_dict().items():
        if field in _HONOURED or field in _HARMLESS or field.startswith("_"):
            continue
        if value is not None and value is not False and value != defaults.get(field):
            raise UserError(
                f"{field}: {value!r} cannot be honoured by speculative decoding, which warps many "
                "rows at once: leave it unset"
            )
