"""The checkpoints of a run: which there are, whether they are whole, and which were given up.

They are folders ``checkpoints/step-000012``. Whoever goes on from an older one gives up what is
newer: that moves to ``abandoned-1`` in the run's folder, ``abandoned-2`` the next time, which looks
like a run of its own and stays until somebody removes it.
"""

import errno
import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sapo_megatron.errors import UserError, first_problem
from sapo_megatron.files import checksum, sync, whole_file, whole_folder, write_whole
from sapo_megatron.runs.state import listed

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of checkpoints, as their ``checksums.json`` says it; those of format 1 had none."""
MANIFEST = "checksums.json"
LINES = ("metrics.jsonl", "samples.jsonl")
"""Files of a run in which each line is a JSON object with its ``step``."""
MOVE = "abandoning"
"""While checkpoints are on their way aside: whereto, the step that stays the last, their names."""


class Manifest(BaseModel):
    """What a checkpoint says of itself in ``checksums.json``."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: int
    megatron_core: str
    """The release that wrote it."""
    files: dict[str, tuple[int, int]]
    """Size and CRC-32 of every other file, by name."""
    crc32: int = 0
    """Of what stands before it."""

    def own_crc32(self) -> int:
        """What ``crc32`` must be."""
        return zlib.crc32(self.model_dump_json(exclude={"crc32"}).encode())


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints but those that were given up, damaged ones too, oldest first.

    Raises UserError as ``listed``.
    """
    names = {name for name in listed(run / "checkpoints") if re.fullmatch(r"step-\d+", name)}
    kept = names.difference(_given_up(run)[2:])
    return sorted((run / "checkpoints" / name for name in kept), key=step_of)


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint or of a dump has in it."""
    return int(re.split("[-.]", path.name)[1])


def home(run: Path) -> Path:
    """The run that ``run`` was given up of, or itself."""
    return run.parent if run.name.startswith("abandoned-") else run


def write_manifest(checkpoint: Path, release: str, files: dict[str, tuple[int, int]]) -> None:
    """Say what the files of a checkpoint are, once they are all there."""
    plain = Manifest(format=FORMAT, megatron_core=release, files=files)
    signed = plain.model_copy(update={"crc32": plain.own_crc32()})
    write_whole(checkpoint / MANIFEST, signed.model_dump_json())


def read_manifest(checkpoint: Path) -> Manifest | str:
    """What a checkpoint says of itself, or what is wrong with that.

    Raises UserError for one of another format.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"no {MANIFEST}, as in those of format 1, which are not read any more"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        return f"{MANIFEST}: {first_problem(error)}"
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    if manifest.crc32 != manifest.own_crc32():
        return f"{MANIFEST}: not what was written"
    if manifest.format != FORMAT:
        raise UserError(
            f"{checkpoint}: expected a checkpoint of format {FORMAT}, got {manifest.format}; go on "
            f"with the release of sapo_megatron that wrote it"
        )
    return manifest


def damage(checkpoint: Path, files: dict[str, tuple[int, int]]) -> str | None:
    """What is wrong with these files of a checkpoint; None where they are as they were written."""
    for name, expected in files.items():
        path = checkpoint / Path(name).name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected[0]:
                return f"{name}: {path.stat().st_size} bytes instead of {expected[0]}"
            if checksum(path) != expected:
                return f"{name}: not what was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def abandon(run: Path, after: int) -> None:
    """Give up what a run has behind step ``after``: checkpoints, and what goes with them.

    Killed at any time, it has not begun, or the next call of :func:`settle` ends it.
    """
    newer = [path.name for path in checkpoints(run) if step_of(path) > after]
    if newer:
        taken = [int(p.name[10:]) for p in run.glob("abandoned-*") if p.name[10:].isdecimal()]
        words = [f"abandoned-{max(taken, default=0) + 1}", str(after), *newer]
        write_whole(run / MOVE, "\n".join(words))
        settle(run)


def settle(run: Path) -> None:
    """End what :func:`abandon` has begun, if it has, in this process or in one before."""
    if not (words := _given_up(run)):
        return
    into, after, newer = run / words[0], int(words[1]), words[2:]
    logger.warning("%s and what came with them: moved to %s", ", ".join(newer), into)
    if not into.exists():
        with whole_folder(into) as folder:
            for name in ("config.yaml", *LINES):
                if (run / name).exists():
                    shutil.copy(run / name, folder / name)
    for path in filter(Path.exists, (run / name for name in LINES)):
        keep_lines(path, after)
    moved = [run / "checkpoints" / name for name in newer]
    moved += [p for p in run.glob("dumps/step-*") if step_of(p) > after]
    moved += [run / "summary.json", run / "report", run / "wandb" / "run_id"]
    for path in filter(Path.exists, moved):
        target = into / path.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    sync(into / "checkpoints")
    sync(run / "checkpoints")
    (run / MOVE).unlink()


def keep_lines(path: Path, last: int) -> None:
    """Leave of a file of lines those of steps up to ``last``, none of one that is not there."""
    path.touch()
    with whole_file(path) as temporary, path.open("rb") as lines, temporary.open("wb") as kept:
        for number, line in enumerate(lines, 1):
            try:
                if json.loads(line)["step"] <= last:
                    kept.write(line.rstrip(b"\n") + b"\n")
            except (ValueError, KeyError, TypeError):
                logger.warning("%s:%d: not a whole line (cut off?), dropped", path, number)
        kept.flush()
        os.fsync(kept.fileno())


def add_lines(path: Path, lines: bytes) -> None:
    """Append to a file, on the disk at once. Raises OSError where it cannot, with none of it."""
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _given_up(run: Path) -> list[str]:
    return (run / MOVE).read_text().split() if (run / MOVE).exists() else []
