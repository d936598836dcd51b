"""Checkpoints with damaged files: each is found before it is used, and the one before is taken.

Every file of the newest checkpoint of a run on two ranks is damaged in every way in turn. Named
itself, the checkpoint is refused in a line that names the file; ``--resume auto`` takes the one
before, and in every tenth trial goes on from it in earnest.
"""

import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sapo_megatron.errors import UserError
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.recipe.schema import ParallelConfig
from sapo_megatron.runs.history import MANIFEST, checkpoints
from sapo_megatron.training import loop
from tests.support import whole_runs
from tests.support.gloo import run_ranks
from tests.support.tiny import read_metrics, write_recipe
from tests.torture import Outcome

DAMAGES = 120
AT_ONCE = 10
"""Trials of one world of ranks."""


def trials(seed: int, folder: Path) -> Iterator[Outcome]:
    """Damages of one file each."""
    run_ranks(2, _make, folder)
    for first in range(0, DAMAGES, AT_ONCE):
        found = run_ranks(2, _try, folder, seed, range(first, first + AT_ONCE))
        yield from found[0]


def _make(folder: Path) -> None:
    """A run that stops after step 4 of 6, with two checkpoints that hold what is ahead."""
    if dist.get_rank() == 0:
        write_recipe(
            folder,
            parallel={"expert_model_parallel_size": 2},
            rollout={"async_steps": 1},
            checkpoint={"every": 1, "keep": 2},
            train={"steps": 6, "run_dir": str(folder / "run")},
        )
    dist.barrier()
    step = loop.run_step

    def stopping(session: Any, number: int) -> Any:
        if number == 4 and dist.get_rank() == 0:
            (folder / "run" / "stop").touch()
        return step(session, number)

    loop.run_step = stopping
    whole_runs.run(folder)


def _missing(path: Path, draw: random.Random, older: bytes) -> None:
    path.unlink()


def _empty(path: Path, draw: random.Random, older: bytes) -> None:
    path.write_bytes(b"")


def _cut(path: Path, draw: random.Random, older: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(1, len(content))])


def _longer(path: Path, draw: random.Random, older: bytes) -> None:
    path.write_bytes(path.read_bytes() + b"\0" + draw.randbytes(draw.randrange(100)))


def _flipped(path: Path, draw: random.Random, older: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _scattered(path: Path, draw: random.Random, older: bytes) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    path.write_bytes(content)


def _blank(path: Path, draw: random.Random, older: bytes) -> None:
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content) // 2)
    end = min(begin + 4096, len(content))
    content[begin:end] = bytes(b ^ 255 for b in content[begin:end])
    path.write_bytes(content)


def _other(path: Path, draw: random.Random, older: bytes) -> None:
    """As it is in the checkpoint before; where that is the same, turned round."""
    content = path.read_bytes()
    path.write_bytes(older if older != content else content[::-1])


def _folder(path: Path, draw: random.Random, older: bytes) -> None:
    path.unlink()
    path.mkdir()


def _circle(path: Path, draw: random.Random, older: bytes) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _typed(path: Path, draw: random.Random, older: bytes) -> None:
    """A value of JSON becomes one of another type; what is no JSON is flipped."""
    if path.suffix != ".json":
        return _flipped(path, draw, older)
    held = json.loads(path.read_text())
    name = draw.choice(sorted(held))
    others = [None, "x", 1.5, True, [], {}, -1, 10**30]
    held[name] = draw.choice([value for value in others if value != held[name]])
    path.write_text(json.dumps(held))


WAYS: tuple[Callable[[Path, random.Random, bytes], None], ...] = (
    *(_missing, _empty, _cut, _longer, _flipped, _scattered, _blank, _other, _folder, _circle),
    _typed,
)


def _try(folder: Path, seed: int, numbers: range) -> list[Outcome]:
    """On a rank: the trials of these numbers."""
    outcomes = []
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        copy = folder / f"copy-{number}"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "run", copy)
        dist.barrier()
        before, newest = checkpoints(copy)
        files = sorted(path.name for path in newest.iterdir())
        name, way = files[number % len(files)], WAYS[number // len(files) % len(WAYS)]
        if number >= len(files) * len(WAYS):
            name, way = draw.choice(files), draw.choice(WAYS)
        dist.barrier()
        if dist.get_rank() == 0:
            older = before / name
            way(newest / name, draw, older.read_bytes() if older.exists() else b"")
        dist.barrier()
        problem = _problem(folder, copy, in_earnest=number % 10 == 0, file=name)
        outcomes.append(Outcome(trial=f"{name}: {way.__name__[1:]} ({number})", problem=problem))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(copy)
    return outcomes


def _problem(folder: Path, copy: Path, *, in_earnest: bool, file: str) -> str:
    before, newest = checkpoints(copy)
    settings = {"train__run_dir": copy, "train__steps": 5}
    if in_earnest:
        whole_runs.run(folder, "auto", **settings)
        steps = [line["step"] for line in read_metrics(copy)]
        aside = [path.name for path in checkpoints(copy / "abandoned-1")]
        if steps != [1, 2, 3, 4, 5] or aside != [newest.name]:
            return f"went on with lines {steps}, and put aside {aside}"
        return ""
    logger, told = logging.getLogger("sapo_megatron"), _Told()
    logger.addHandler(told)
    groups = parallel.setup(ParallelConfig(expert_model_parallel_size=2), seed=0)
    try:
        taken = checkpoint.newest_whole([newest, before], groups)
        try:
            checkpoint.newest_whole([newest], groups)
        except UserError as error:
            told.lines.append(str(error))
        # The checksums of another checkpoint tell of the files that they are not of.
        named = [line for line in told.lines if file in line or file == MANIFEST]
        good = [line for line in named if "\n" not in line]
        return "" if taken == before and len(good) == 2 else f"took {taken}, said {told.lines}"
    finally:
        parallel.teardown()
        logger.removeHandler(told)


class _Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
