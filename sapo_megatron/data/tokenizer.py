"""Text <-> token ids, from a sentencepiece model or a Hugging Face tokenizer."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import jinja2
import sentencepiece

from sapo_megatron.errors import UserError, one_line

logger = logging.getLogger(__name__)

Message = dict[str, str]
"""One turn of a conversation: its ``role`` (system, user or assistant) and its ``content``."""


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer."""

    eos_id: int
    vocab_size: int
    """Every id the tokenizer makes is below it; the model's vocabulary may be larger (padded)."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` alone: no special token is added."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation in the chat template, up to where the answer starts.

        Raises UserError where there is no template, or where it refuses the conversation."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens and ids from beyond the vocabulary."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece ``.model`` file."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file is missing, malformed or has no eos piece."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise _unreadable(path, error) from None
        if self._model.eos_id() < 0:
            raise UserError(f"model.tokenizer: expected an eos piece in {path}, got none")
        self._path = path
        self._warned = False
        self.eos_id = self._model.eos_id()
        self.vocab_size = self._model.get_piece_size()

    def encode(self, text: str) -> list[int]:
        ids = self._model.encode(text)
        if self._model.unk_id() in ids and not self._warned:
            logger.warning("%s has no piece for some of %r; it is lost", self._path, text)
            self._warned = True
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        raise UserError(
            f"data.apply_chat_template: expected a tokenizer with a chat template, got {self._path}"
            f"; set it to false and write the turns into data.template"
        )

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in ids if i < self.vocab_size])


class HuggingFaceTokenizer:
    """A transformers ``AutoTokenizer``."""

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        """``path``: a local folder or a name on the hub; ``trust_remote_code``: whether Python
        code that comes with it may run.

        Raises UserError when it cannot be loaded or has no eos token.
        """
        from transformers import AutoTokenizer  # seconds to import

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise _unreadable(path, error) from None
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"model.tokenizer: expected an eos token in {path}, got none")
        self._path = path
        self.eos_id = self._tokenizer.eos_token_id
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"data.apply_chat_template: expected a tokenizer with a chat template, got "
                f"{self._path}; set it to false and write the turns into data.template"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:  # some refuse a system turn, or two turns of one role
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"data.apply_chat_template: the chat template of {self._path} refuses the turns "
                f"{roles}: {one_line(error)}; change the data or the tokenizer"
            ) from None
        return self.encode(rendered)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(
            [i for i in ids if i < self.vocab_size],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )


def load_tokenizer(path: str, vocab_size: int, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer at ``path``: a ``.model`` file, a folder with one or with a Hugging Face
    tokenizer, or a name on the hub.

    Raises UserError when it cannot be read, or makes ids that a model with ``vocab_size`` rows of
    embeddings does not have.
    """
    place = Path(path)
    model_file = place / "tokenizer.model" if place.is_dir() else place
    fast = (place / "tokenizer.json", place / "tokenizer_config.json")
    tokenizer: Tokenizer
    if model_file.suffix == ".model" and not any(f.exists() for f in fast):
        tokenizer = SentencePieceTokenizer(model_file)
    else:
        tokenizer = HuggingFaceTokenizer(path, trust_remote_code=trust_remote_code)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.tokenizer: expected at most the model's vocab_size {vocab_size} ids, got "
            f"{tokenizer.vocab_size} from {path}; use the model's own tokenizer"
        )
    return tokenizer


def _unreadable(path: str | Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"model.tokenizer: no such file: {path}")
    return UserError(
        f"model.tokenizer: expected a sentencepiece model or a Hugging Face tokenizer, could not "
        f"read {path}: {one_line(error, 200)}"
    )
