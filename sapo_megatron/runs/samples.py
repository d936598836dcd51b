"""What the model writes: ``samples.jsonl``, a JSON object for each of a few groups per step.

A step's groups are there before it trains on them, so that those of a step that fails can be read,
too. The file is ASCII, whatever models write.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sapo_megatron.errors import UserError, first_problem, one_line

NAME = "samples.jsonl"
LONGEST = 4000
"""Characters of a text that are shown outside of the file."""
Picked = Literal["best", "worst", "random"]
STEP = re.compile(rb'\{"step": ?(\d+),')
"""How a line begins."""


class ShownResponse(BaseModel):
    """A response, and what became of it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    text: str
    """As the reward function was given it."""
    reward: float
    advantage: float
    tokens: int
    truncated: bool
    stop_token: str | None
    """What ended it; None where the limit of its length did."""
    staleness_mean: float
    """Steps from the weights that drew its tokens to those that the step starts from."""
    staleness_max: int


class ShownGroup(BaseModel):
    """A prompt of a step and the responses to it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    step: int
    picked: Picked
    """Why this group: its mean reward is the highest of the step, or the lowest, or neither."""
    prompt: str
    """As the model was given it: in the chat template, with special tokens."""
    answer: str
    task: str
    responses: Annotated[tuple[ShownResponse, ...], Field(min_length=1)]

    @property
    def reward(self) -> float:
        """The mean over the responses."""
        return fmean(response.reward for response in self.responses)


def places_of(path: Path) -> dict[int, list[int]]:
    """Where the lines of each step begin in a file; no step where there is no file.

    A last line that is still being written is left out. Raises UserError for another that is none.
    """
    places: dict[int, list[int]] = {}
    if not path.exists():
        return places
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            if not (found := STEP.match(line)):
                got = one_line(line.decode(errors="replace"), 60)
                raise UserError(
                    f"{path}:{number}: expected a JSON object that begins with step, got {got!r}; "
                    f"remove the line"
                )
            places.setdefault(int(found[1]), []).append(at)
            at += len(line)
    return places


def read_groups(path: Path, places: Iterable[int]) -> list[ShownGroup]:
    """The groups of the lines at these places. Raises UserError for one that is damaged."""
    groups = []
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            try:
                groups.append(ShownGroup.model_validate_json(file.readline()))
            except ValidationError as error:
                raise UserError(
                    f"{path}: expected groups of responses, got a damaged one at byte {place} "
                    f"({first_problem(error)}); remove the line"
                ) from None
    return groups


def excerpt(text: str) -> str:
    """A text of at most ``LONGEST`` characters; of a longer one both ends, and what is left out."""
    if len(text) <= LONGEST:
        return text
    note = f"[... {len(text) - LONGEST:,} characters left out, {NAME} has them ...]"
    return f"{text[: LONGEST // 2]}\n{note}\n{text[-LONGEST // 2 :]}"
