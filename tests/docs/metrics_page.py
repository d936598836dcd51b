"""``docs/metrics.md``: which metrics it names."""

import functools
import re

from tests.support.tiny import ROOT

PAGE = ROOT / "docs" / "metrics.md"


@functools.cache
def names() -> tuple[str, ...]:
    """All that the first columns of its tables name, with ``{...}`` for what is open in it."""
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    return tuple(name for row in rows for name in re.findall(r"`(.*?)`", row))


def means(named: str, metric: str) -> bool:
    """Whether a name of the page stands for a metric, in which ``*`` is only known in a run."""
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(named)), metric) is not None


def has(metric: str) -> bool:
    return any(means(named, metric) for named in names())
