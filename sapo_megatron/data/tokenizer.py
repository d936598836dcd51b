"""Text <-> token ids, from a sentencepiece model or a Hugging Face tokenizer."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from sapo_megatron.errors import UserError, one_line
from sapo_megatron.hf.folder import check_inside

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

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt without a chat template: what the tokenizer puts in front of a text
        (mostly its bos), once, and the text's."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation in the chat template, up to where the answer starts.

        Raises UserError where there is no template, or where it refuses the conversation."""
        ...

    def turn_ends(self) -> dict[int, str]:
        """The tokens that the chat template writes first after an answer, by id: at the end of a
        conversation, and before another turn. None where it writes none, or refuses answers."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without bos, eos and padding and ids from beyond the vocabulary.

        Other special tokens, such as the tags around a thought, are in it as they are written."""
        ...

    def spell(self, ids: Iterable[int]) -> str:
        """The same with bos, eos and padding as they are written."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece ``.model`` file.

    Such a file does not say whether a text begins with a bos, so none is added; where a folder has
    ``tokenizer_config.json``, that does. Control pieces have no text.
    """

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

    encode_prompt = encode

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        raise UserError(
            f"data.apply_chat_template: expected a tokenizer with a chat template, got {self._path}"
            f"; set it to false and write the turns into data.template"
        )

    def turn_ends(self) -> dict[int, str]:
        return {}

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in ids if i < self.vocab_size])

    def spell(self, ids: Iterable[int]) -> str:
        parts = groupby((i for i in ids if i < self.vocab_size), self._model.is_control)
        return "".join(
            "".join(map(self._model.id_to_piece, part)) if control else self.decode(part)
            for control, part in parts
        )


class HuggingFaceTokenizer:
    """A transformers ``AutoTokenizer``."""

    def __init__(
        self, path: str, *, trust_remote_code: bool, template_arguments: Mapping[str, Any]
    ) -> None:
        """``path``: a local folder or a name on the hub; ``trust_remote_code``: whether Python
        code that comes with it may run; ``template_arguments``: variables of the chat template.

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
        self._arguments = dict(template_arguments)
        self.eos_id = self._tokenizer.eos_token_id
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        whole, alone = self._tokenizer.encode("a"), self.encode("a")
        places = range(len(whole) - len(alone) + 1)
        begin = next((i for i in places if whole[i : i + len(alone)] == alone), 0)
        self._front = whole[:begin]
        for name in self._arguments:
            if name not in str(self._tokenizer.chat_template):
                logger.warning(
                    "data.chat_template_kwargs.%s: the chat template of %s does not use it",
                    name,
                    path,
                )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        ids = self.encode(text)
        return ids if ids[: len(self._front)] == self._front else [*self._front, *ids]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(self._render(messages, add_generation_prompt=True))

    def turn_ends(self) -> dict[int, str]:
        answer = "zebra"
        user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": answer}
        own = {i: str(token) for i, token in self._tokenizer.added_tokens_decoder.items()}
        found: dict[int, str] = {}
        for turns in ([user, assistant], [user, assistant, user]):
            try:
                rendered = self._render(turns, add_generation_prompt=False)
            except UserError as error:
                logger.info("no look at how turns end: %s", error)
                continue
            _, written, rest = rendered.rpartition(answer)
            ends = [i for i in self.encode(rest) if own.get(i, "").strip()] if written else []
            found.update({i: own[i] for i in ends[:1]})
        return found

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """A conversation in the chat template. Raises UserError."""
        if not self._tokenizer.chat_template:
            raise UserError(
                f"data.apply_chat_template: expected a tokenizer with a chat template, got "
                f"{self._path}; set it to false and write the turns into data.template"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._arguments,
            )
        except Exception as error:  # a template is a program, and some refuse turns on purpose
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"data.apply_chat_template: the chat template of {self._path} refuses the turns "
                f"{roles}: {one_line(error)}; change the data, data.chat_template_kwargs or the "
                f"tokenizer"
            ) from None
        assert isinstance(rendered, str)
        return rendered

    def decode(self, ids: Iterable[int]) -> str:
        silent = {self._tokenizer.bos_token_id, self.eos_id, self._tokenizer.pad_token_id}
        return self.spell(i for i in ids if i not in silent)

    def spell(self, ids: Iterable[int]) -> str:
        text = self._tokenizer.decode(
            [i for i in ids if i < self.vocab_size],
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
        assert isinstance(text, str)
        return text


def load_tokenizer(
    path: str,
    vocab_size: int,
    *,
    trust_remote_code: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer at ``path``: a ``.model`` file, a folder with one or with a Hugging Face
    tokenizer, or a name on the hub.

    Raises UserError when it cannot be read, or makes ids that a model with ``vocab_size`` rows of
    embeddings does not have.
    """
    place = Path(path)
    if place.is_dir():
        check_inside(place)
    model_file = place / "tokenizer.model" if place.is_dir() else place
    fast = (place / "tokenizer.json", place / "tokenizer_config.json")
    tokenizer: Tokenizer
    if model_file.suffix == ".model" and not any(f.exists() for f in fast):
        tokenizer = SentencePieceTokenizer(model_file)
    else:
        tokenizer = HuggingFaceTokenizer(
            path,
            trust_remote_code=trust_remote_code,
            template_arguments=template_arguments or {},
        )
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.tokenizer: expected ids below the vocab_size {vocab_size} of the model's "
            f"config.json, got {tokenizer.vocab_size - 1} from {path}; use the model's own "
            f"tokenizer, or remove the tokens that were added to it"
        )
    return tokenizer


def _unreadable(path: str | Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"model.tokenizer: no such file: {path}")
    return UserError(
        f"model.tokenizer: expected a sentencepiece model or a Hugging Face tokenizer, could not "
        f"read {path}: {one_line(error, 200)}"
    )
