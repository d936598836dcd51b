"""Hugging Face tokenizers as models come with them: bytes, tokens of their own, a chat template."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = 256
"""The tokens that are given have ids from here on."""
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<s>")
EOT, START, END, USER, ASSISTANT, BOS = range(BYTES, BYTES + len(TOKENS))
THINK = ("<think>", "</think>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A turn ends where the next one begins."""


def save_tokenizer(
    folder: Path,
    template: str | None = CHATML,
    *,
    front: Sequence[int] = (),
    back: Sequence[int] = (),
    special: bool = True,
) -> Path:
    """Bytes, ``TOKENS`` and ``THINK``; ``front`` and ``back``: what goes around a text;
    ``special``: whether the tokens of ``THINK`` count as special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    words.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in THINK])
    around = [TOKENS[i - BYTES] for i in (*front, *back)]
    if around:
        words.post_processor = processors.TemplateProcessing(
            single=[*around[: len(front)], "$A", *around[len(front) :]],
            special_tokens=[(token, words.token_to_id(token)) for token in set(around)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
