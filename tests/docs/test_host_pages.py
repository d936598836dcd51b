"""The pages of the hosts are alike, and name what the patches name."""

import importlib
import inspect
import re

import pytest

from sapo_megatron.patches import HOSTS, ms_swift, nemo_rl
from tests.support.tiny import ROOT

FOLDER = ROOT / "docs" / "patches"
HEADINGS = ["Install", "Use", "Replaced and kept", "Refused", "Metrics", "Verified"]
ROW = re.compile(
    r"^\| \[(?P<title>.+?)\]\((?P<page>.+?)\) \| `(?P<name>\w+)` .* (?P<version>\S+) \|$"
)
ROWS = [
    found for line in (FOLDER / "README.md").read_text().splitlines() if (found := ROW.match(line))
]
"""Of the table of hosts."""


def refused(page):
    """What code names in the section of that heading."""
    section = page.read_text().partition("## Refused\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`([\w.]+)", section))


def test_every_host_has_a_row():
    assert tuple(row["name"] for row in ROWS) == HOSTS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_row_and_its_page_say_what_the_patch_says(row):
    host = importlib.import_module(f"sapo_megatron.patches.{row['name']}").HOST
    assert (row["title"], row["version"]) == (host.title, host.verified)
    verified = (FOLDER / row["page"]).read_text().partition("## Verified\n")[2]
    assert f"{host.title} {host.verified}" in verified


@pytest.mark.parametrize("page", sorted(FOLDER.glob("[!R]*.md")), ids=lambda page: page.stem)
def test_every_page_has_the_same_headings(page):
    assert re.findall(r"^#{2,} (.*)$", page.read_text(), re.M) == HEADINGS
    assert page.name in {row["page"] for row in ROWS}


def test_what_is_refused_is_on_the_page():
    assert refused(FOLDER / "nemo-rl.md") >= nemo_rl.REFUSED.keys()
    keys = set(re.findall(r'"(\w+\.\w+)"', inspect.getsource(ms_swift._refused)))
    assert len(keys) > 10
    assert keys == {name for name in refused(FOLDER / "ms-swift.md") if "." in name}
