"""Files and folders that are written whole or not at all, and what tells that they still are."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 2**22
"""Bytes that are read at a time: as many as a cache holds."""


def read_text(path: Path) -> str:
    """The UTF-8 text of a file of at most 64 MiB.

    Raises UnicodeDecodeError, and OSError, also for a pipe, which may never end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > 64 << 20:
        raise OSError(f"expected a file of at most 64 MiB, got {stat.filemode(found.st_mode)}")
    return path.read_text(encoding="utf-8")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, a text as UTF-8; what was there before is there until the new one is whole."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` once the block is through.

    A block that fails leaves ``path`` as it was, and nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``path`` once the block is through.

    A block that fails leaves ``path`` as it was, and nothing beside it; what one left that was
    killed goes now. Makes the folders above.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*/in-use"):
        with contextlib.suppress(OSError), left.open("r+") as held:  # gone, or in use
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
        new = Path(aside) / "new"
        with (Path(aside) / "in-use").open("w") as held:
            with contextlib.suppress(OSError):  # where files cannot be locked
                fcntl.flock(held, fcntl.LOCK_EX)
            new.mkdir()
            yield new
            if path.exists():
                path.rename(Path(aside) / "old")
            new.rename(path)
            sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold what this process sees of a file, or of the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size, found, buffer = 0, 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, found = size + count, zlib.crc32(buffer[:count], found)
    return size, found
