"""What the pages of the project name: links, commands, files, keys and metrics."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS, ENDINGS = "recipes|launch|docs|benchmarks|tests", "yaml|sh|sbatch|py|md|json"

ROOMS = "|".join(path.parent.name for path in (ROOT / "sapo_megatron").glob("*/__init__.py"))


def links(page: Path) -> list[str]:
    """Targets of a page's links that are not on the network."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in found if not re.match(r"\w+:", target)]


def broken(page: Path, target: str) -> bool:
    """Whether a link of a page leads to no file, or to no heading of it."""
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    if not file.exists():
        return True
    return bool(anchor) and anchor not in anchors(file.read_text())


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^    .*$", "", text, flags=re.M), re.M):
        heading = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def code(page: Path) -> list[str]:
    """Spans of code, and lines of blocks, in which a backslash goes on with the next."""
    text = page.read_text()
    blocks = re.findall(r"^ {4,}(?![-*|] ).*$", re.sub(r" *\\\n *", " ", text), re.M)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)] + blocks


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each ``sapo-megatron SUBCOMMAND`` with its flags."""
    for line in code(page):
        for found in re.finditer(r"\bsapo[-_]megatron ([a-z]+)\b([^#|;&]*)", line):
            yield found[1], re.findall(r"(?<![\w-])--([\w-]+)", found[2])


def targets(page: Path) -> Iterator[str]:
    """Each target that make is called with."""
    for line in code(page):
        bare = re.sub(r"""(["']).*?\1""", "", line)
        for found in re.finditer(r"(?:^|\s)make ((?:[\w./-]+(?:=\S*)? ?)+)", bare):
            yield from (word for word in found[1].split() if "=" not in word)


def made() -> set[str]:
    """What the Makefile has a rule for."""
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) [:?]?= *(.*)$", text, re.M))
    rules = re.findall(r"^([^\s#:=]+):(?!=)", text, re.M)
    for _ in range(3):
        rules = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], rule) for rule in rules]
    return set(rules)


def files(page: Path) -> list[str]:
    """Files of the repository, and of the package's rooms, that code names."""
    form = rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]+\.(?:{ENDINGS})|(?:{ROOMS})/\w+\.py)\b"
    return [name for line in code(page) for name in re.findall(form, line)]


def recipes(page: Path) -> Iterator[dict[str, Any]]:
    """Blocks of code that are YAML with sections in it."""
    for block in re.findall(r"(?:^ {4}.*\n)+", page.read_text(), re.M):
        try:
            found = yaml.safe_load(textwrap.dedent(block))
        except yaml.YAMLError:
            continue  # another language
        if isinstance(found, dict) and any(isinstance(part, dict) for part in found.values()):
            yield found


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")


def dotted(page: Path, sections: set[str]) -> Iterator[str]:
    """Names in code that begin with a section of a recipe."""
    for line in code(page):
        for name in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)(?![\w(*/])", line):
            if name.split(".")[0] in sections:
                yield name


def slashed(page: Path, groups: set[str]) -> Iterator[str]:
    """Names in code that look like a metric of one of ``groups``."""
    for line in code(page):
        for name in re.findall(r"(?<![\w./<-])([a-z_]+/[\w/@{}*+%-]+)(?![\w.])", line):
            if name.split("/")[0] in groups:
                yield name
