"""Pages that can be followed: what their fenced blocks ask for, done in a copy of the repository.

A block is of one of four kinds, by its tag and the paragraph before it:

- after a paragraph with "new file `NAME`", that file, in whatever language;
- ``diff``: a change of files, of which every hunk fits one place alone;
- ``sh``: commands, which end with status 0;
- ``text``: lines that the commands before it print.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.tiny import ROOT

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEW_FILE = re.compile(r"[Nn]ew file\s+`(.+?)`")
LONGEST_S = 300


class Block(NamedTuple):
    """A fenced block of a page."""

    place: str
    """Page and line, for messages."""
    kind: str
    """Its tag; ``file`` for a new file's."""
    text: str
    name: str = ""
    """Of a new file."""


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in their order."""
    text = page.read_text()
    for found in FENCED.finditer(text):
        before = text[: found.start()]
        place = f"{page.name}:{before.count(chr(10)) + 1}"
        if named := NEW_FILE.search(before.rstrip().rpartition("\n\n")[2]):
            yield Block(place, "file", found[2], named[1])
            continue
        assert found[1] in ("diff", "sh", "text"), f"{place}: a new file? Name it above it"
        yield Block(place, found[1], found[2])


def new_files(page: Path) -> set[str]:
    """Names of the files that following a page makes."""
    return set(NEW_FILE.findall(page.read_text()))


def follow(page: Path, folder: Path) -> None:
    """Do what a page says in ``folder``, a :func:`copy`; fails where it does not work."""
    printed = ""
    for block in blocks(page):
        if block.kind == "file":
            file = folder / block.name
            assert not file.exists(), f"{block.place}: {block.name} is no new file"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.kind == "diff":
            _change(block, folder)
        elif block.kind == "sh":
            printed = _run(block, folder)
        else:
            missing = [line for line in block.text.splitlines() if line.strip() not in printed]
            assert missing == [], f"{block.place}: not printed by the commands above:\n{printed}"


def copy(folder: Path) -> Path:
    """The repository's files, what Python has compiled of them, and the environment of this."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for file in (ROOT / name for name in names.split("\0") if name):
        compiled = file.parent.glob(f"__pycache__/{file.stem}.*") if file.suffix == ".py" else ()
        for source in filter(Path.is_file, (file, *compiled)):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / ".venv" / path.name).symlink_to(path)
    # For make, which installs nothing into an environment that is newer than what it asks for.
    (folder / ".venv" / ".installed").unlink(missing_ok=True)
    (folder / ".venv" / ".installed").touch()
    return folder


def _change(block: Block, folder: Path) -> None:
    # Without its first line, a diff of a second file looks like a line that the first is to lose.
    for change in re.split(r"^diff --git a/", block.text, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@.*@@.*\n", change, flags=re.MULTILINE)
        name = head.split()[0]
        for hunk in hunks:
            kept = [line for line in hunk.splitlines(True) if line[0] != "+"]
            old = "".join(line[1:] or line for line in kept)
            count = (folder / name).read_text().count(old)
            assert count == 1, f"{block.place}: {count} places of {name} have\n{old}"
    done = _done(["git", "apply", "--recount", "-"], folder, block.text)
    assert done.returncode == 0, f"{block.place}: does not apply: {done.stdout}"


def _run(block: Block, folder: Path) -> str:
    done = _done(["bash", "-euxc", block.text], folder)
    assert done.returncode == 0, f"{block.place}: status {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def _done(words: list[str], folder: Path, given: str = "") -> subprocess.CompletedProcess:
    """Run in ``folder``, as in the shell of someone who has activated its environment."""
    env = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(
        words,
        cwd=folder,
        env={**env, "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"},
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LONGEST_S,
    )
