"""When is it the router? The law of router variance, its controls, and engines.

    python -m benchmarks.studies.router_law.models      train the models, once
    python -m benchmarks.studies.router_law.law         the law, and its controls
    python -m benchmarks.studies.router_law.engines     bf16 and fp8 rollouts against a trainer
    python -m benchmarks.studies.router_law.small       what few swaps do to a share
    python -m benchmarks.studies.router_law.figures     draw all figures from the results
    python -m benchmarks.studies.router_law.folder MODEL    the same numbers of any model folder

Each leaves out what its folder of results already has. ``docs/router-variance.md`` says what is
measured, and what was found.
"""

from pathlib import Path

ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parent / "results"
CACHE = ROOT / "runs" / "router-law"
