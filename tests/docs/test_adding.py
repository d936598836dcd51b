"""The pages on adding something work: each is followed, block by block, in a copy of all files."""

import pytest

from tests.docs.follow import blocks, copy, follow
from tests.support.tiny import ROOT


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "add").glob("*.md")), ids=lambda page: page.stem
)
def test_a_page_can_be_followed(page, tmp_path):
    follow(page, copy(tmp_path / "repository"))


FILE = """\
A new file `a/b.py`:

```python
x = 1
y = 2
z = 1
```

"""
DIFF = """\
Then

```diff
diff --git a/a/b.py b/a/b.py
--- a/a/b.py
+++ b/a/b.py
@@ -2 +2 @@
 x = 1
-y = 2
+y = 3
 z = 1
```

"""
RUN = """\
```sh
python -c 'from a.b import y; print(f"y is {y}")'
```

It says

```text
y is 3
```
"""


@pytest.fixture
def followed(tmp_path):
    """Follows a page with this text, in an empty folder."""

    def followed(text):
        page, folder = tmp_path / "page.md", tmp_path / "empty"
        page.write_text(text)
        folder.mkdir()
        follow(page, folder)
        return folder

    return followed


def test_files_changes_and_commands_are_followed_in_their_order(followed):
    assert (followed(FILE + DIFF + RUN) / "a" / "b.py").read_text() == "x = 1\ny = 3\nz = 1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FILE + FILE, "page.md:11: a/b.py is no new file"),
        (FILE + DIFF.replace("y = 2", "y = 4"), "page.md:11: 0 places of a/b.py have"),
        (FILE.replace("x", "x = 1\ny = 2\nz = 1\nx") + DIFF, "page.md:14: 2 places"),
        (FILE + DIFF.replace("@@ -2 +2 @@", "@@ @@"), "page.md:11: does not apply"),
        (FILE + DIFF + RUN.replace("is 3", "is 4"), "page.md:28: not printed"),
        (FILE + RUN.replace("a.b", "a.c"), "page.md:9: status 1"),
        ("```sh\nfalse\ntrue\n```\n", "page.md:1: status 1"),
        ("It is\n\n```python\nx = 1\n```\n", "page.md:3: a new file"),
    ],
)
def test_what_does_not_work_is_told_with_its_place(followed, text, said):
    with pytest.raises(AssertionError, match=said):
        followed(text)


def test_a_block_is_named_by_the_line_before_it(tmp_path):
    (tmp_path / "page.md").write_text(FILE + DIFF + RUN)
    assert [(b.place, b.kind, b.name) for b in blocks(tmp_path / "page.md")] == [
        ("page.md:3", "file", "a/b.py"),
        ("page.md:11", "diff", ""),
        ("page.md:22", "sh", ""),
        ("page.md:28", "text", ""),
    ]
