"""Bytes of Python source, the text of all models here: files to train on, and others to measure."""

import functools
import random
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

from sapo_megatron.sample import Sample

VOCABULARY = 256
HELD_OUT = 5
"""One file of so many is kept from training."""
LEFT_OUT = ("site-packages", "test", "pydoc_data", "lib2to3")


@functools.cache
def stdlib(*, held_out: bool) -> bytes:
    """The standard library's modules, end to end, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        kept_out = zlib.crc32(name.encode()) % HELD_OUT == 0
        if kept_out == held_out and not any(word in name for word in LEFT_OUT):
            found.append(path.read_bytes())
    return b"".join(found)


def sequences(text: Sequence[int], count: int, length: int, *, seed: int) -> list[Sample]:
    """Windows of ``length`` + 1 tokens at random places, of which all but the first are predicted.

    ``text``: bytes, or ids of tokens.
    """
    rng = random.Random(seed)
    starts = [rng.randrange(len(text) - length - 1) for _ in range(count)]
    return [as_sample(uid, text[at : at + length + 1]) for uid, at in enumerate(starts)]


def as_sample(uid: int, tokens: Sequence[int]) -> Sample:
    """A sequence, all of which is response but its first token."""
    return Sample(
        uid=uid,
        prompt_tokens=(tokens[0],),
        response_tokens=list(tokens[1:]),
        rollout_logprobs=[0.0] * (len(tokens) - 1),
        truncated=False,
    )
