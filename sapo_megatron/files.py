"""Files and folders that are written whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``path`` once the block is through.

    A block that fails leaves ``path`` as it was, and nothing beside it. Makes the folders above.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
        new = Path(aside) / "new"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(Path(aside) / "old")
        new.rename(path)
