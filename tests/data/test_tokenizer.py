"""Tokenizers: exact round trips, and refusals in one line."""

import json
import string
from pathlib import Path

import pytest
import reasoning_gym
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.recipe.load import load
from tests.support.chat import BOS, BYTES, CHATML, EOT, START, THINK, TOKENS, save_tokenizer

TINY = Path(__file__).parents[2] / "recipes" / "tiny-moe"
TINY_TOKENIZER = load_tokenizer(str(TINY), 104)
WORDS = ["<pad>", "<eos>", "<user>", "<bot>", "what", "is", "1", "2"]


def user(content):
    return {"role": "user", "content": content}


def refusal(path, vocab_size=1000):
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(path), vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def hf_folder(tmp_path):
    """A Hugging Face tokenizer of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<bot>' if m['role'] == 'assistant' else '<user>' }} "
        "{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@given(st.text(alphabet=string.printable.replace("\t", "").replace("\r\x0b\x0c", "")))
def test_tiny_round_trip_is_exact(text):
    ids = TINY_TOKENIZER.encode(text)
    assert TINY_TOKENIZER.decode(ids) == text
    assert all(2 < i < TINY_TOKENIZER.vocab_size for i in ids)


def test_tiny_fits_its_model_and_its_task():
    recipe = load(TINY.parent / "tiny-moe-cpu.yaml")
    vocab_size = read_architecture(recipe.model.path).vocab_size
    assert vocab_size % 8 == 0
    tokenizer = load_tokenizer(recipe.model.path, vocab_size)
    task = recipe.data.train.tasks[0]
    for item in reasoning_gym.create_dataset(task.name, seed=1, size=200, **task.options):
        assert len(tokenizer.encode(item["question"])) <= recipe.rollout.max_prompt_length
        assert len(tokenizer.encode(item["answer"])) < recipe.rollout.max_response_length


def test_tiny_digits_are_pieces_of_their_own():
    assert len(TINY_TOKENIZER.encode("100")) == 3
    assert TINY_TOKENIZER.encode("11") == TINY_TOKENIZER.encode("1") * 2
    assert TINY_TOKENIZER.encode("") == []


def test_special_and_padding_ids_have_no_text():
    ids = TINY_TOKENIZER.encode("42")
    padded = [*ids, TINY_TOKENIZER.eos_id, 0, TINY_TOKENIZER.vocab_size, 103]
    assert TINY_TOKENIZER.decode(padded) == "42"


def test_spelled_out_are_special_ids_too(tmp_path):
    ids = [0, *TINY_TOKENIZER.encode("4 + 2"), TINY_TOKENIZER.eos_id, 103]
    assert TINY_TOKENIZER.spell(ids) == "<pad>4 + 2</s>"
    assert TINY_TOKENIZER.spell(iter([TINY_TOKENIZER.eos_id])) == "</s>"
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)), 512)
    prompt = tokenizer.encode_chat([user("4 \n\u4e2d")])
    written = "<|im_start|>user\n4 \n\u4e2d<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.spell([*prompt, EOT, 511]) == f"{written}<|endoftext|>"
    assert tokenizer.decode([*prompt, EOT, 511]) == written


def test_a_character_without_a_piece_is_warned_of_once(caplog):
    tokenizer = load_tokenizer(str(TINY / "tokenizer.model"), 104)
    tokenizer.encode("caf\u00e9")
    tokenizer.encode("caf\u00e9")
    assert len(caplog.messages) == 1
    assert "no piece" in caplog.text


def test_huggingface(hf_folder):
    tokenizer = load_tokenizer(str(hf_folder), 8)
    assert tokenizer.encode("what is 1") == [4, 5, 6]
    assert tokenizer.encode_chat([user("what is 1")]) == [2, 4, 5, 6, 3]
    assert tokenizer.decode([4, 6, 1, 999]) == "what 1"
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (1, 8)


def test_a_tokenizer_larger_than_the_model(hf_folder):
    for path, rows, largest in ((hf_folder, 7, 7), (TINY / "tokenizer.model", 64, 99)):
        message = refusal(path, rows)
        assert f"vocab_size {rows} of the model's config.json, got {largest} from {path}" in message


def test_added_tokens_count_however_many_rows_are_padding(tmp_path):
    folder = save_tokenizer(tmp_path)
    largest = BYTES + len(TOKENS) + len(THINK) - 1
    assert f"got {largest} from {folder}" in refusal(folder, largest)
    assert load_tokenizer(str(folder), largest + 1).vocab_size == largest + 1
    assert load_tokenizer(str(folder), 512).vocab_size == largest + 1


def test_a_chat_template_is_asked_of_the_tokenizer(hf_folder):
    with pytest.raises(UserError, match="apply_chat_template"):
        TINY_TOKENIZER.encode_chat([user("x")])
    (hf_folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="apply_chat_template"):
        load_tokenizer(str(hf_folder), 8).encode_chat([user("x")])


def test_a_conversation_is_rendered_turn_by_turn(hf_folder):
    tokenizer = load_tokenizer(str(hf_folder), 8)
    turns = [user("1"), {"role": "assistant", "content": "2"}, user("what is")]
    assert tokenizer.encode_chat(turns) == [2, 6, 3, 7, 2, 4, 5, 3]


def test_turns_that_the_template_refuses(hf_folder):
    refusing = "{{ raise_exception('no system\nturn here') }}"
    (hf_folder / "chat_template.jinja").write_text(refusing)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(hf_folder), 8).encode_chat([{"role": "system", "content": "x"}])
    assert "\n" not in str(caught.value)
    for part in ("data.apply_chat_template", "turns system", "no system turn here"):
        assert part in str(caught.value)


def test_a_template_that_fails_on_its_arguments(hf_folder):
    (hf_folder / "chat_template.jinja").write_text("{{ 'a' + level }}")
    tokenizer = load_tokenizer(str(hf_folder), 8, template_arguments={"level": 3})
    with pytest.raises(UserError, match=r"refuses the turns user: .*data\.chat_template_kwargs"):
        tokenizer.encode_chat([user("x")])


def test_an_argument_that_the_template_does_not_use_is_warned_of(tmp_path, caplog):
    arguments = {"enable_thinking": False, "enable_thinkng": False}
    load_tokenizer(str(save_tokenizer(tmp_path)), 512, template_arguments=arguments)
    (message,) = caplog.messages
    assert message.startswith("data.chat_template_kwargs.enable_thinkng: ")


@pytest.mark.parametrize(
    ("front", "back"), [((), ()), ((BOS,), ()), ((BOS,), (EOT,)), ((), (EOT,)), ((START, BOS), ())]
)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tmp_path, front, back):
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, front=front, back=back)), 512)
    alone = tokenizer.encode("2 + 2 =")
    assert len(alone) == 7
    assert tokenizer.encode_prompt("2 + 2 =") == [*front, *alone]
    written = "".join(TOKENS[i - BYTES] for i in front)
    assert tokenizer.encode_prompt(written + "2 + 2 =") == [*front, *alone]


def test_a_chat_prompt_has_the_bos_of_its_template_alone(tmp_path):
    folder = save_tokenizer(tmp_path, "<s>" + CHATML, front=(BOS,))
    ids = load_tokenizer(str(folder), 512).encode_chat([user("x")])
    assert ids.count(BOS) == 1
    assert ids[:2] == [BOS, START]


def test_a_sentencepiece_model_adds_no_bos():
    assert TINY_TOKENIZER.encode_prompt("1 + 1") == TINY_TOKENIZER.encode("1 + 1")


@pytest.mark.parametrize("special", [True, False])
def test_thinking_tags_come_back_to_the_letter(tmp_path, special):
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, special=special)), 512)
    text = "<think>\n1 + 1 ,  caf\u00e9 .\n</think>\n\n2"
    ids = tokenizer.encode(text)
    tags = [BYTES + len(TOKENS), BYTES + len(TOKENS) + 1]
    assert [i for i in ids if i >= BYTES] == tags
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([EOT, *ids, EOT, 400]) == text


def test_missing_and_malformed_files(tmp_path, hf_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such file" in refusal(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    assert "bad.model" in refusal(tmp_path / "bad.model")
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(tmp_path / "empty")
    (hf_folder / "tokenizer.json").write_text("{")
    assert str(hf_folder) in refusal(hf_folder)


def test_no_eos(hf_folder, tmp_path):
    path = hf_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    (hf_folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert "eos token" in refusal(hf_folder)
    with (tmp_path / "noeos.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["ab"]),
            model_writer=file,
            model_type="char",
            vocab_size=3,
            eos_id=-1,
            bos_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    assert "eos piece" in refusal(tmp_path / "noeos.model")
