"""Make ``tokenizer.model``: one piece per printable ASCII character, and one for "Calculate".

Run ``python recipes/tiny-moe/make_tokenizer.py`` to make the file anew, beside this script.
"""

import io
import logging
import string
from pathlib import Path

import reasoning_gym
import sentencepiece

logger = logging.getLogger(__name__)

VOCAB_SIZE = 104
"""A multiple of 8; three control pieces, "Calculate", newline, 95 characters, four unused."""


def make(path: Path) -> None:
    """Write the tokenizer to ``path`` and check that the texts of the task survive it."""
    tasks = reasoning_gym.create_dataset("basic_arithmetic", seed=0, size=500)
    texts = [text for item in tasks for text in (item["question"], item["answer"])]
    characters = [*sorted(set(string.printable) - set(string.whitespace)), " "]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *characters]),
        model_writer=model,
        model_type="char",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        required_chars="".join(characters).replace(" ", ""),
        user_defined_symbols=["Calculate", "\n"],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    size = tokenizer.get_piece_size()
    assert size <= VOCAB_SIZE, f"{size} pieces do not fit {VOCAB_SIZE}"
    for text in (*texts, "".join(characters), "two  spaces\n and a line "):
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
    logger.info("%s: %d pieces", path, size)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    make(Path(__file__).with_name("tokenizer.model"))
