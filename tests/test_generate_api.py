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
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from controllers import make_policy
from tests import tiny
from tests.tiny import CHARACTERS
from tts import Conversation, DistillConfig, SpeculativeDecoder, UserError
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
        {"forced_eos_token_id": 0}, {"guidance_scale": 0},
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
        ({"max_new_tokens": 3.5}, "max_new_tokens: it leaves 3.5"),
        ({"max_new_tokens": None, "max_length": 3}, "max_length: it leaves 0"),
        ({"stop_strings": [""]}, "stop_strings"),
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
        ([[3, 4]], "list is no tensor of token ids"),
        (torch.zeros(1, 3), "no tensor of token ids"),
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
    with pytest.raises(UserError, match=r"give make_policy\('mlp'\)"):
        SpeculativeDecoder(pair, policy="mlp")
    with pytest.raises(UserError, match="generation_config: a dict"):
        SpeculativeDecoder(pair, policy=policy).generate(PROMPT, generation_config={})
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
    with pytest.raises(UserError, match="path: a token is outside"):
        greedy.generate(PROMPT, path=[5, 99])


def test_what_is_nearly_greedy_is_greedy(decoder):
    greedy = decoder.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=9))
    cold = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=1e-40)
    assert decoder.generate(PROMPT, generation_config=cold).tokens == greedy.tokens


def test_every_end_of_sequence_id_ends_the_text(pair, decoder):
    free = decoder.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=20)).tokens
    config = GenerationConfig(max_new_tokens=20, eos_token_id=(free[9], free[6]))
    result = decoder.generate(PROMPT, generation_config=config)
    assert result.finish_reason == "eos"
    assert result.tokens == free[: min(free.index(free[9]), free.index(free[6])) + 1]


@pytest.mark.parametrize("acceptance", ["rejection", "block", "coupled"])
def test_turns_of_a_conversation_do_not_share_their_random_numbers(acceptance):
    flat = tiny.pair()
    for model in (flat.target, flat.draft):
        model.lm_head.weight.zero_()  # every token is as likely as any other, whatever came before
    decoder = SpeculativeDecoder(flat, policy=make_policy("fixed"), acceptance=acceptance)
    session, config = decoder.session(), GenerationConfig(max_new_tokens=12, do_sample=True)
    turns = [
        decoder.generate(PROMPT, generation_config=config, session=session).tokens for _ in range(2)
    ]
    assert turns[0] != turns[1]


@pytest.mark.parametrize("where", ["criterion", "on_round"])
@pytest.mark.parametrize("architecture", ["llama3.1", "qwen3.5"])
def test_an_interrupted_session_goes_on_with_the_targets_text(architecture, where):
    pair = tiny.pair(architecture, noise=0.05)
    decoder = SpeculativeDecoder(pair, policy=make_policy("fixed", gamma=4))
    calls = []

    def interrupts(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return torch.tensor([False])

    session, config = decoder.session(), GenerationConfig(max_new_tokens=40)
    decoder.generate(PROMPT, generation_config=config, session=session)
    criteria = StoppingCriteriaList([interrupts]) if where == "criterion" else None
    on_round = interrupts if where == "on_round" else None
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(
            PROMPT, generation_config=config, session=session,
            stopping_criteria=criteria, on_round=on_round,
        )  # fmt: skip
    before = torch.tensor([[*session.sequence, *PROMPT[0].tolist()]])
    result = decoder.generate(PROMPT, generation_config=config, session=session)
    expected = pair.target.generate(before, max_new_tokens=40, do_sample=False)
    assert result.sequences.tolist() == expected.tolist()


def test_a_refused_call_changes_nothing():
    distill = DistillConfig(stride=4, window=8, max_update_share=1)
    decoder = SpeculativeDecoder(tiny.pair(), policy=make_policy("fixed", gamma=4), distill=distill)
    decoder.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=60))
    assert decoder.coordinator.adapted
    with pytest.raises(UserError, match="vocabulary"):
        decoder.generate(torch.tensor([[99]]))
    assert decoder.coordinator.adapted


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


def test_max_time_ends_after_the_round(decoder, monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr("tts.stopping.time.monotonic", lambda: next(seconds))
    config = GenerationConfig(max_new_tokens=400, max_time=3.5)
    result = decoder.generate(PROMPT, generation_config=config)
    assert (len(result.rounds), result.finish_reason) == (4, "time")


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


@pytest.mark.parametrize("criterion", [MaxLengthCriteria(8), MaxTimeCriteria(1e-9)], ids=type)
def test_custom_generate_keeps_criteria_of_the_caller(pair, decoder, criterion):
    kwargs = {"max_new_tokens": 40, "stopping_criteria": StoppingCriteriaList([criterion])}
    plain = pair.target.generate(PROMPT, do_sample=False, **kwargs)
    ours = pair.target.generate(PROMPT, do_sample=False, custom_generate=decoder, **kwargs)
    assert ours.tolist() == plain.tolist()
    assert plain.shape[1] < 43


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
    with pytest.raises(UserError, match="position_ids"):
        generate(position_ids=torch.tensor([[0, 40, 90]]))
    other = tiny.model("llama3.1", seed=9)
    with pytest.raises(UserError, match="another target"):
        other.generate(PROMPT, max_new_tokens=5, custom_generate=decoder)


def test_a_template_that_refuses_a_system_prompt_is_named(pair):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    other = SpeculativeDecoder(pair._replace(tokenizer=tokenizer), policy=make_policy("fixed"))
    Conversation(other)
    with pytest.raises(UserError, match="no system"):
        Conversation(other, system="be brief")


def test_a_system_prompt_is_read(decoder):
    ids = Conversation(decoder, "cd").turn("a")[0].tolist()
    text = f"<cd{CHARACTERS[63]}<a{CHARACTERS[63]}>"
    assert ids == decoder.pair.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_turns_may_follow_each_other_without_text_between(pair):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = SpeculativeDecoder(pair._replace(tokenizer=tokenizer), policy=make_policy("fixed"))
    chat = Conversation(other)
    for _ in range(2):
        chat.say("ab", generation_config=GenerationConfig(max_new_tokens=3))
    assert len(chat.session.sequence) == 10


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
