"""What a check of the doctor says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    status: Literal["ok", "warn", "fail", "skipped"]
    found: str
    todo: str = ""
    """What to do about it; empty where there is nothing to do."""
