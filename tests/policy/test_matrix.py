"""Loss and gradients of every layout against a dense single-process reference.

The ranks are started once and walk through the layouts. The reference is computed in fp64 on the
same weights; the error of a parameter is the norm of the difference over the norm of the
reference's gradient, and a gradient that must be zero must be zero. The gradient norm that the
optimizer clips by is the reference's on every rank, with weights marked as torch's layers leave
them and as Transformer Engine's do.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.exactness import Measured, measure
from tests.support.gloo import run_worlds
from tests.support.layouts import LAYOUTS, NARROW, REPRESENTATIVE, Layout
from tests.support.minibatches import MODELS, make_reference, random_weights, sequences
from tests.support.reference import Outcome

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
USUAL = {"float32": NARROW, "float64": REPRESENTATIVE}
"""What an ordinary run walks through; fp32 has its errors 1e6 times as close to the bound."""
CASES = [
    pytest.param(
        layout,
        dtype,
        id=f"{layout.name}-{dtype}",
        marks=() if layout in USUAL[dtype] else pytest.mark.slow,
    )
    for layout in LAYOUTS
    for dtype in TOLERANCE
]
DOCS = Path(__file__).parents[2] / "docs" / "exactness.md"


@dataclass(kw_only=True)
class Result:
    """A layout's measurement beside what it had to be."""

    measured: Measured
    expected: Outcome
    errors: dict[str, float]
    """Relative error of each parameter's gradient."""

    @property
    def loss_error(self) -> float:
        return abs(self.measured.loss / float(self.expected.loss) - 1)

    @property
    def worst(self) -> str:
        return max(self.errors, key=self.errors.__getitem__)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Results of all cases that this session selected, by (layout, dtype); text for a failure."""
    here = [item for item in request.session.items if item.path == request.path]
    chosen = {
        (item.callspec.params["layout"], item.callspec.params["dtype"])
        for item in here
        if hasattr(item, "callspec")
    }
    if any(item.name == "test_write_docs" for item in here):
        chosen = {param.values for param in CASES}
    cases = sorted(chosen, key=lambda case: (case[0].name, case[1]))
    folder = tmp_path_factory.mktemp("matrix")
    expected = {}
    for layout, _ in cases:
        weights = folder / layout.model
        if not weights.exists():
            random_weights(MODELS[layout.model], weights)
        if (key := _key(layout)) not in expected:
            expected[key] = make_reference(layout, weights)
    outs = [folder / f"gradients{i}" for i in range(len(cases))]
    jobs = [
        (layout.world, (layout, dtype, folder / layout.model, out))
        for (layout, dtype), out in zip(cases, outs, strict=True)
    ]
    return {
        case: found if isinstance(found, str) else _result(found[0], expected[_key(case[0])], out)
        for case, found, out in zip(cases, run_worlds(measure, jobs), outs, strict=True)
    }


def _key(layout: Layout) -> tuple[str, str, str, bool, float]:
    return layout.model, layout.objective, layout.batch, layout.replay, layout.replay_threshold


def _result(measured: Measured, expected: Outcome, folder: Path) -> Result:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    assert tensors.keys() == expected.gradients.keys()
    errors = {name: _error(tensors[name], right) for name, right in expected.gradients.items()}
    return Result(measured=measured, expected=expected, errors=errors)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    size = float(expected.norm())
    if size == 0:
        return math.inf if got.any() else 0.0
    error = float((got.double() - expected).norm()) / size
    return error if math.isfinite(error) else math.inf


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_layout(results, layout, dtype):
    result = results[layout, dtype]
    assert not isinstance(result, str), result
    measured, expected = result.measured, result.expected
    assert result.loss_error < TOLERANCE[dtype]
    assert result.errors[result.worst] < TOLERANCE[dtype], result.worst
    assert not measured.replicas_differ
    norm = math.hypot(*(float(gradient.norm()) for gradient in expected.gradients.values()))
    assert len(measured.grad_norms) == 2 * layout.world
    assert measured.grad_norms == pytest.approx([norm] * len(measured.grad_norms), rel=1e-5)
    tolerance = TOLERANCE[dtype]
    for name, value in expected.metrics.items():
        assert measured.metrics[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    valid = sum(bool(s.response) for s in sequences(layout.batch))
    assert measured.idle_ranks >= max(layout.dp - valid, 0)


def test_the_batch_is_what_it_should_be():
    """Routes far from a tie, a gate that acts, and sequences of every awkward kind."""
    batch = sequences("ragged")
    assert len({len(s.response) for s in batch}) > 4
    assert any(not s.response for s in batch)
    assert any(s.advantage == 0 and s.response for s in batch)
    assert sum(bool(s.response) for s in batch) < 8, "one of 8 ranks has no valid token"
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.slow
@pytest.mark.skipif("SAPO_WRITE_DOCS" not in os.environ, reason="writes docs/exactness.md")
def test_write_docs(results):
    rows = []
    for layout in LAYOUTS:
        narrow, wide = (results[layout, dtype] for dtype in TOLERANCE)
        cells = [layout.name, str(layout.world), str(wide.measured.micro_batches)]
        for result in (narrow, wide):
            cells += [f"{result.loss_error:.0e}", f"{result.errors[result.worst]:.0e}"]
        rows.append(f"| {' | '.join(cells)} |")
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(PAGE.format(count=len(LAYOUTS), rows="\n".join(rows)))


PAGE = """\
# Exact under every layout

The loss and its gradients are the same numbers however the model and the batch are cut. This table
is written by `tests/policy/test_matrix.py`, which runs {count} layouts on up to 8 gloo ranks in
fp32 and in fp64 (`make test` all of them in fp64 and a few in fp32, `make test-all` the rest), and
compares them with a dense reference: `tests/support/reference.py`, plain torch in fp64, one
sequence at a time, no code shared with the package, itself compared with transformers.

What is compared, after the backward pass of a mini-batch through the production path (DDP,
distributed optimizer's reduce-scatter):

- the loss: relative error;
- the gradient of every parameter, gathered to its full shape under its Hugging Face name: norm of
  the difference over the norm of the reference's gradient. The table has the largest of all
  parameters. A gradient that must be zero (an expert without tokens) must be exactly zero;
- the norm of all gradients, which clipping divides by, on every rank;
- weights that several tensor-parallel or pipeline ranks hold: the same to the bit;
- the metrics (`ratio/log_var`, `ratio/ess`, ...): those of the whole batch.

Bounds: 1e-5 in fp32, 1e-11 in fp64. The fp32 errors are those of fp32 arithmetic itself: one rank
has them as well.

The model has 4 layers, 8 experts, 8 heads on 4 key-value heads and a vocabulary of 61, which no
tensor-parallel size divides. `tied`: tied embeddings; `mixed`: layers 0 and 2 dense; `unnormed`:
expert weights not renormalised; `dense`: no experts; `hybrid`: Qwen3.5-MoE, with Gated DeltaNet in
layers 0, 2 and 3. Packed batches unless it says padded; in-place
log-probs unless it says fused. The batch has responses of 0 to 12 tokens, one of them empty, a
group whose advantages are zero, and ratios from about 0.1 to 30, so that the gate acts; with 8
data-parallel ranks some have no valid token. Objectives: SAPO with the paper's settings unless it
says `warm` (other temperatures, entropy bonus), `token-mean`, `gspo`, or `balanced` (SAPO with the
MoE auxiliary loss, on identical micro-batches, because that loss is defined on a micro-batch).
`replay`: every token goes to experts drawn at random, in the reference too; with a `threshold`, to
those of them that the router bears out and else to its own (`routing.replay_threshold`).
`contract` and `per-token loss` are Megatron's ways to scale a loss. DP counts what tensor, pipeline
and context parallelism leave over; EP divides it.

| layout | ranks | micro-batches | fp32 loss | fp32 gradient | fp64 loss | fp64 gradient |
| --- | --: | --: | --: | --: | --: | --: |
{rows}

Write it again with

    SAPO_WRITE_DOCS=1 make test ARGS='-m "slow or not slow" tests/policy/test_matrix.py'
"""
