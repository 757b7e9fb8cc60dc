"""GenerationConfig, stopping, conversations and transformers' own entry point."""

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TopKLogitsWarper,
)
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from controllers import make_policy
from tests import tiny
from tests.tiny import CHARACTERS
from tts import Conversation, SpeculativeDecoder, UserError
from tts.settings import resolve

PROMPT = torch.tensor([[3, 17, 5]])


@pytest.fixture(scope="module")
def pair():
    return tiny.pair(noise=0.05)


@pytest.fixture
def decoder(pair):
    return SpeculativeDecoder(pair, policy=make_policy("fixed", gamma=4), acceptance="coupled")


def test_unset_fields_are_resolved_as_transformers_resolves_them(pair):
    sampling, limits = resolve(pair.target, GenerationConfig(do_sample=True), 5)
    assert (sampling.top_k, sampling.temperature, sampling.top_p) == (50, 1.0, 1.0)
    assert limits.max_new_tokens == 20
    sampling, limits = resolve(pair.target, GenerationConfig(max_length=12, min_length=9), 5)
    assert sampling.temperature == 0
    assert (limits.max_new_tokens, sampling.min_new_tokens) == (7, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"typical_p": 0.5}, {"top_h": 0.3},
        {"bad_words_ids": [[4]]}, {"guidance_scale": 2.0}, {"epsilon_cutoff": 0.1},
        {"num_return_sequences": 2, "do_sample": True}, {"output_scores": True},
        {"sequence_bias": {(3,): 1.0}},
        {"forced_eos_token_id": 3}, {"prompt_lookup_num_tokens": 3}, {"token_healing": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_cannot_be_honoured_is_refused_by_name(decoder, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        decoder.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=5, **fields))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "min_p": 1.5}, "min_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repetition_penalty": -2.0}, "repetition_penalty"),
    ],
)
def test_a_bad_value_is_refused_by_name(decoder, fields, name):
    config = GenerationConfig(max_new_tokens=5)
    for field, value in fields.items():
        setattr(config, field, value)
    with pytest.raises(UserError, match=name):
        decoder.generate(PROMPT, generation_config=config)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "empty"),
        (torch.zeros(2, 3, dtype=torch.long), "one sequence"),
        (torch.full((1, 3), 99), "vocabulary"),
        (torch.zeros(1, 512, dtype=torch.long), "context of 512"),
    ],
)
def test_a_bad_prompt_is_refused(decoder, prompt, match):
    with pytest.raises(UserError, match=match):
        decoder.generate(prompt)


def test_bad_options_of_the_decoder_are_refused(pair):
    policy = make_policy("fixed")
    with pytest.raises(UserError, match="acceptance: 'typical'"):
        SpeculativeDecoder(pair, policy=policy, acceptance="typical")
    with pytest.raises(UserError, match="draft_window: 0"):
        SpeculativeDecoder(pair, policy=policy, draft_window=0)
    with pytest.raises(UserError, match="gamma: -1"):
        make_policy("fixed", gamma=-1)
    with pytest.raises(UserError, match="gamma: 41"):
        make_policy("fixed", gamma=41)
    with pytest.raises(UserError, match="policy: 'best'"):
        make_policy("best")
    greedy = SpeculativeDecoder(pair, policy=policy, acceptance="greedy")
    with pytest.raises(UserError, match="greedy is for temperature 0"):
        greedy.generate(PROMPT, generation_config=GenerationConfig(do_sample=True))
    rejection = SpeculativeDecoder(pair, policy=policy)
    with pytest.raises(UserError, match="path"):
        rejection.generate(PROMPT, generation_config=GenerationConfig(do_sample=True), path=[1])


def test_a_stop_string_inside_a_block_ends_the_text_where_transformers_ends_it(pair, decoder):
    free = pair.target.generate(PROMPT, max_new_tokens=40, do_sample=False)[0, 3:].tolist()
    for at in range(8, 16):
        stop = CHARACTERS[free[at]]
        config = GenerationConfig(max_new_tokens=40, do_sample=False, stop_strings=[stop])
        theirs = pair.target.generate(PROMPT, generation_config=config, tokenizer=pair.tokenizer)
        ours = decoder.generate(PROMPT, generation_config=config)
        assert ours.sequences.tolist() == theirs.tolist()
        assert ours.finish_reason == "stop"


def test_custom_stopping_criteria_see_every_token(pair, decoder):
    def fifth(input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] == 8])

    result = decoder.generate(
        PROMPT,
        generation_config=GenerationConfig(max_new_tokens=40),
        stopping_criteria=StoppingCriteriaList([fifth]),
    )
    assert len(result.tokens) == 5


def test_max_time_ends_after_the_round(decoder):
    config = GenerationConfig(max_new_tokens=400, max_time=1e-6)
    result = decoder.generate(PROMPT, generation_config=config)
    assert (len(result.rounds), result.finish_reason) == (1, "time")


def test_custom_generate_equals_plain_generate(pair, decoder):
    plain = pair.target.generate(PROMPT, max_new_tokens=30, do_sample=False)
    ours = pair.target.generate(PROMPT, max_new_tokens=30, do_sample=False, custom_generate=decoder)
    assert ours.tolist() == plain.tolist()
    structured = pair.target.generate(
        PROMPT, max_new_tokens=30, custom_generate=decoder, return_dict_in_generate=True
    )
    assert structured.sequences.tolist() == plain.tolist()


def test_custom_generate_passes_seed_and_sampling_on(pair, decoder):
    kwargs = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    ours = pair.target.generate(PROMPT, custom_generate=decoder, seed=3, **kwargs)
    direct = decoder.generate(PROMPT, generation_config=GenerationConfig(**kwargs), seed=3)
    assert ours.tolist() == direct.sequences.tolist()


def test_custom_generate_refuses_what_it_would_ignore(pair, decoder):
    def generate(**kwargs):
        pair.target.generate(PROMPT, max_new_tokens=5, custom_generate=decoder, **kwargs)

    with pytest.raises(UserError, match="NoBadWords"):
        generate(logits_processor=LogitsProcessorList([NoBadWordsLogitsProcessor([[3]])]))
    with pytest.raises(UserError, match="TopKLogitsWarper"):
        generate(
            do_sample=True, top_k=9, logits_processor=LogitsProcessorList([TopKLogitsWarper(4)])
        )
    filled = DynamicCache(config=pair.target.config)
    pair.target(PROMPT[:, :2], past_key_values=filled, use_cache=True)
    with pytest.raises(UserError, match="past_key_values"):
        generate(past_key_values=filled)
    with pytest.raises(UserError, match="attention_mask"):
        generate(attention_mask=torch.tensor([[0, 1, 1]]))
    other = tiny.model("llama3.1", seed=9)
    with pytest.raises(UserError, match="another target"):
        other.generate(PROMPT, max_new_tokens=5, custom_generate=decoder)


def test_a_conversation_is_the_rendered_template_with_the_generated_ids_kept(pair, decoder):
    config = GenerationConfig(max_new_tokens=9, eos_token_id=63)
    chat = Conversation(decoder)
    first = chat.say(CHARACTERS[5] + CHARACTERS[6], generation_config=config)
    second = chat.say(CHARACTERS[7], generation_config=config)
    sequence = second.sequences[0].tolist()
    head = [0, 5, 6, 63, 1]
    assert sequence[:5] == head
    answer = first.tokens
    end = [] if answer[-1] == 63 else [63]
    assert sequence[5 : 5 + len(answer)] == answer
    assert sequence[5 + len(answer) :][: 4 + len(end)] == [*end, 0, 7, 63, 1]
    assert second.rounds[0].position == len(answer)
    plain = pair.target.generate(
        torch.tensor([sequence[: -len(second.tokens)]]), generation_config=config, do_sample=False
    )
    assert plain[0].tolist() == sequence
