"""Which tokens end a response, by everything that says so."""

import json

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.load import load
from sapo_megatron.training.inputs import demonstrations, preflight, read_inputs
from tests.support.chat import ASSISTANT, BOS, CHATML, END, EOT, GLM, USER, save_tokenizer
from tests.support.tiny import ARCH, write_recipe

VOCABULARY = 300


def inside(**config):
    """The text model of one that also sees."""
    return {**ARCH, "vocab_size": VOCABULARY, **config}


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a model with these ends in its two files, and a tokenizer with a template."""

    def make(
        template=CHATML, *, config=None, generation=None, chat=True, stop_token_ids=(), **data
    ):
        save_tokenizer(tmp_path / "tokenizer", template)
        path = write_recipe(
            tmp_path,
            arch={"vocab_size": VOCABULARY, **(config or {})},
            model={"tokenizer": "tokenizer"},
            data={"apply_chat_template": chat, **data},
            rollout={
                "stop_token_ids": list(stop_token_ids),
                "max_prompt_length": 80,
                "max_response_length": 20,
            },
        )
        if generation is not None:
            text = generation if isinstance(generation, str) else json.dumps(generation)
            (tmp_path / "model" / "generation_config.json").write_text(text)
        return load(path)

    return make


def endings(recipe):
    return read_inputs(recipe, 1).endings


def refusal(recipe):
    with pytest.raises(UserError) as caught:
        preflight(recipe, 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("said", "stop_ids"),
    [
        ({"chat": False}, (EOT,)),
        ({"chat": False, "config": {"eos_token_id": END}}, (EOT, END)),
        ({"chat": False, "generation": {"eos_token_id": [USER, END, USER]}}, (EOT, END, USER)),
        ({"chat": False, "generation": {"eos_token_id": None}}, (EOT,)),
        ({"chat": False, "generation": {"temperature": 0.6}}, (EOT,)),
        ({"chat": False, "config": {"text_config": inside(eos_token_id=[END, 3])}}, (3, EOT, END)),
        ({"chat": False, "stop_token_ids": [7, 7, EOT]}, (7, EOT)),
        (
            {
                "config": {"eos_token_id": 0, "text_config": inside(eos_token_id=9)},
                "generation": {"eos_token_id": [END]},
                "stop_token_ids": [USER],
            },
            (0, 9, EOT, END, USER),
        ),
    ],
)
def test_everything_that_is_said_counts_once(recipe, said, stop_ids):
    assert endings(recipe(**said)).stop_ids == stop_ids


@pytest.mark.parametrize(
    ("template", "stops", "turn_id"),
    [
        (CHATML, [END], END),
        (CHATML, [USER, END], END),
        (GLM, [USER], USER),  # nothing at the end of a conversation; the next turn's first token
        (GLM.replace("%}", "%}plain ", 1).replace("<|{{ m.role }}|>", "{{ m.role }}:"), [], EOT),
        ("<|user|>{{ messages[0].content }}", [], EOT),  # leaves answers out
        ("{{ raise_exception('no') if messages[1] }}{{ messages[0].content }}", [], EOT),
        ("{{ 1 + messages[1].content if messages[1] }}{{ messages[0].content }}", [], EOT),
    ],
)
def test_an_answer_to_learn_from_ends_as_turns_do(recipe, template, stops, turn_id):
    made = recipe(template, generation={"eos_token_id": stops})
    assert endings(made).turn_id == turn_id
    inputs = preflight(made, 1)
    for sample in demonstrations(made, inputs):
        *answer, last = sample.response_tokens
        assert last == turn_id
        assert inputs.tokenizer.decode(answer).isdigit()


def test_two_ways_to_end_a_turn_of_which_one_is_known(recipe):
    """As in templates that end the last turn in another way than those before it."""
    both = CHATML.replace("<|im_end|>", "{{ '<s>' if loop.last else '<|im_end|>' }}")
    assert endings(recipe(both, stop_token_ids=[BOS])).turn_id == BOS
    assert endings(recipe(both, stop_token_ids=[END])).turn_id == END


@pytest.mark.parametrize(
    ("template", "token", "text"),
    [(CHATML, END, "<|im_end|>"), (GLM, USER, "<|user|>")],
    ids=["chatml", "glm"],
)
def test_a_token_that_ends_turns_and_no_response_is_named(recipe, template, token, text):
    made = recipe(template, generation={"eos_token_id": [ASSISTANT]})
    message = refusal(made)
    parts = ("rollout.stop_token_ids", text, f"id {token}", f"set rollout.stop_token_ids=[{token}]")
    assert all(part in message for part in parts), message
    assert f"name only [{EOT}, {ASSISTANT}]" in message
    assert endings(recipe(template, stop_token_ids=[token])).turn_id == token
    assert endings(recipe(template, chat=False)).turn_id == EOT


@pytest.mark.parametrize("answers", ["", "{{ raise_exception('no') if messages[1] }}"])
def test_the_log_says_that_nothing_is_checked(recipe, caplog, answers):
    with caplog.at_level("INFO"):
        endings(recipe(answers + "{{ messages[0].content }}"))
    assert "how turns end is unchecked" in caplog.text
    assert ("refuses the turns user, assistant" in caplog.text) == bool(answers)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"generation": {"eos_token_id": "2"}}, "generation_config.json: eos_token_id: .*got '2'"),
        (
            {"generation": {"eos_token_id": True}},
            "generation_config.json: eos_token_id: .*got True",
        ),
        ({"generation": {"eos_token_id": [END, -1]}}, "generation_config.json: .*>= 0 .*got -1;"),
        ({"generation": {"eos_token_id": [2.0]}}, r"generation_config.json: .*got 2\.0"),
        ({"generation": {"eos_token_id": {"a": 1}}}, "generation_config.json: .*got {'a': 1}"),
        (
            {"generation": {"eos_token_id": [300]}},
            "generation_config.json: .*vocab_size 300, got 300",
        ),
        ({"generation": "{"}, "generation_config.json: expected JSON, .*correct or remove it"),
        ({"generation": "[1]"}, "generation_config.json: expected a JSON object, got list"),
        ({"config": {"eos_token_id": [-2]}}, "/config.json: eos_token_id: .*got -2"),
        (
            {"config": {"text_config": inside(eos_token_id=1.5)}},
            r"config.json: eos_token_id: .*got \[1.5\]",
        ),
        (
            {"stop_token_ids": [3, 300]},
            "^rollout.stop_token_ids: .*vocab_size 300, got 300; correct",
        ),
    ],
)
def test_ends_that_no_model_has(recipe, said, message):
    made = recipe(**said, chat=False)
    with pytest.raises(UserError, match=message):
        preflight(made, 1)
    refusal(made)


def test_template_arguments_reach_every_prompt(recipe):
    thinking, not_thinking = (
        read_inputs(recipe(stop_token_ids=[END], chat_template_kwargs={"enable_thinking": flag}), 1)
        for flag in (True, False)
    )
    closed = thinking.tokenizer.encode("<think>\n\n</think>\n\n")
    assert len(thinking.problems) == 4
    for with_, without in zip(not_thinking.problems, thinking.problems, strict=True):
        assert with_.tokens == (*without.tokens, *closed)
    (with_,), (without,) = not_thinking.source.next(1), thinking.source.next(1)
    assert with_.tokens == (*without.tokens, *closed)
