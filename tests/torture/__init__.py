"""What users, clusters and attackers do to a run, tried by the hundred: ``make torture``.

A part is a module with ``trials(seed, folder)``, which yields an :class:`Outcome` for each thing
that it tries. The ordinary tests run the first few of each part.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one trial ended."""

    trial: str
    """What was tried, so that a reader can try it again."""
    problem: str = ""
    """What went wrong: a traceback, a silent acceptance, a lost step; nothing where it survived."""
