"""``sapo-megatron samples RUN``: what the model wrote in a step, for a terminal."""

from collections.abc import Iterable
from pathlib import Path

from sapo_megatron.errors import UserError
from sapo_megatron.runs.samples import (
    NAME,
    ShownGroup,
    ShownResponse,
    excerpt,
    places_of,
    read_groups,
)

SHOWN = "\n\t"
"""Characters that are written as they are though they are no signs; others as escapes."""


def show_samples(run: Path, step: int | None, *, worst: bool) -> str:
    """The groups of a step, the last one unless it is given, or only the worst of them.

    Raises UserError for a folder that is no run or has none of that step.
    """
    path = run / NAME
    if not run.is_dir():
        raise UserError(f"samples: expected a run folder, got {run}: no such folder")
    places = places_of(path)
    if not places:
        raise UserError(
            f"{path}: expected at least one step's samples, got none; give the folder of a run "
            f"with logging.samples_per_step above 0 that began a step"
        )
    step = max(places) if step is None else step
    if step not in places:
        raise UserError(f"--step: expected one that {path} has, {_ranges(places)}, got {step}")
    groups = read_groups(path, places[step])
    if worst:
        groups = [min(groups, key=lambda group: group.reward)]
    return f"step {step} of {readable(str(path))}\n" + "".join(map(_written, groups))


def headline(group: ShownGroup) -> str:
    """``worst group of the step: 4 responses, mean reward 0.25``."""
    which = "random group" if group.picked == "random" else f"{group.picked} group of the step"
    task = f", task {group.task!r}" if group.task else ""
    return f"{which}: {len(group.responses)} responses, mean reward {group.reward:.4g}{task}"


def facts(number: int, response: ShownResponse) -> str:
    """``response 2: reward 0, advantage -1.225, 5 tokens, ended by '</s>', staleness 0``."""
    parts = [f"reward {response.reward:.4g}", f"advantage {response.advantage:+.4g}"]
    parts += [f"{response.tokens} tokens"]
    parts += ["cut off at the limit" if response.truncated else f"ended by {response.stop_token!r}"]
    mean, most = response.staleness_mean, response.staleness_max
    parts += [f"staleness {mean:.3g}" + (f" (at most {most})" if mean < most else "")]
    return f"response {number}: {', '.join(parts)}"


def readable(text: str) -> str:
    """An excerpt that can neither steer a terminal nor hide: what is no visible sign is escaped."""
    return "".join(
        c if c.isprintable() or c in SHOWN else c.encode("unicode_escape").decode()
        for c in excerpt(text)
    )


def _written(group: ShownGroup) -> str:
    lines = ["", headline(group), "prompt", *_indented(group.prompt)]
    lines += ["answer", *_indented(group.answer)]
    for number, response in enumerate(group.responses, 1):
        lines += [facts(number, response), *_indented(response.text)]
    return "\n".join(lines) + "\n"


def _indented(text: str) -> list[str]:
    """Lines that none of the model's own can be taken for a headline."""
    return [f"    {line}" for line in readable(text).split("\n")]


def _ranges(numbers: Iterable[int]) -> str:
    """``1 to 3, 7``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join(" to ".join(map(str, ends)) for ends in ranges)
