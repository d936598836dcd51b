"""Run every part: ``python -m tests.torture [SEED] [PART ...]``; ``make torture SEED=n``.

Prints each problem as it is found, and last how much of each part survived. Exit status 1 where
something did not.
"""

import importlib
import logging
import sys
import tempfile
from pathlib import Path

PARTS = ("kills", "damages", "mutations", "data", "hostile", "servers")


def main(words: list[str]) -> int:
    """Run the parts that ``words`` name, or all of them; returns the exit status."""
    numbers, parts = [w for w in words if w.isdigit()], [w for w in words if not w.isdigit()]
    seed = int(numbers[0]) if numbers else 0
    totals, survived = {}, {}
    for part in parts or PARTS:
        trials = importlib.import_module(f"tests.torture.{part}").trials
        totals[part] = survived[part] = 0
        with tempfile.TemporaryDirectory(prefix=f"torture-{part}-") as folder:
            for outcome in trials(seed, Path(folder)):
                totals[part] += 1
                survived[part] += not outcome.problem
                if outcome.problem:
                    sys.stdout.write(f"{part}: {outcome.trial}: {outcome.problem}\n")
                    sys.stdout.flush()
    sys.stdout.write(" ".join(f"{part} {survived[part]}/{totals[part]}" for part in totals) + "\n")
    return int(survived != totals)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    sys.exit(main(sys.argv[1:]))
