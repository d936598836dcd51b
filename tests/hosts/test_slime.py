"""SAPO in slime and miles: on a stand-in, and on the hosts themselves where there is a checkout.

``SAPO_SLIME`` and ``SAPO_MILES`` name checkouts.
"""

import functools
import importlib
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sapo_megatron.errors import UserError
from sapo_megatron.objective.sapo import sapo_weight
from sapo_megatron.patches import miles, replace, slime
from sapo_megatron.sample import Temperatures
from tests.hosts import absent, slime_standin
from tests.hosts import slime_cases as cases
from tests.support import gloo

PATCHES = {"slime": slime, "miles": miles}


@pytest.fixture(params=["slime", "miles"])
def host(request, monkeypatch):
    """The name of a host that has a stand-in."""
    slime_standin.stand_in(request.param, lambda *at: monkeypatch.setitem(sys.modules, *at))
    slime.ready.cache_clear()
    yield request.param
    slime.ready.cache_clear()


def run(host, batch, logits, **changed):
    """The patch's (loss, metrics), each divided as the host does at the end."""
    args = cases.arguments(host, **changed)
    reducer = slime_standin.reducer(args, batch)
    loss, reported = PATCHES[host].policy_loss(args, batch, logits, reducer)
    return loss, {name: float(value) for name, value in reported.items()}


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("changed", [{}, cases.EVERYTHING], ids=["bare", "everything"])
def test_loss_and_gradient_are_ours(host, changed, per_token):
    batch, logits = cases.a_batch()
    changed = {**changed, "calculate_per_token_loss": per_token}
    denominator = int(sum(batch["rollout_mask_sums"])) if per_token else len(cases.TOTAL)
    loss, _ = run(host, batch, logits, **changed)
    expected, _ = cases.ours(batch, logits, **changed)
    torch.testing.assert_close(loss / denominator, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        gradient(loss / denominator, logits), gradient(expected, logits), rtol=1e-12, atol=1e-14
    )


def test_micro_batches_add_up(host):
    batch, logits = cases.a_batch()
    whole, reported = run(host, batch, logits, **cases.EVERYTHING)
    parts = [run(host, *cases.one(batch, logits, i), **cases.EVERYTHING) for i in range(3)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=1e-14)
    for name, value in reported.items():
        if name != "ratio/log_var":
            total = sum(metrics[name] for _, metrics in parts)
            assert total == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("per_token", [False, True])
def test_what_the_dashboard_gets(host, per_token):
    batch, logits = cases.a_batch()
    _, reported = run(host, batch, logits, calculate_per_token_loss=per_token)
    _, expected = cases.ours(batch, logits)
    samples = zip(batch["log_probs"], batch["loss_masks"], batch["advantages"], strict=True)
    z, n = [], []
    weights = []
    for (old, mask, advantages), new in zip(samples, cases.logprobs(batch, logits), strict=True):
        z.append((new - old).detach()[mask.bool()])
        n.append(len(z[-1]))
        tau = cases.TAUS["tau_pos" if advantages[0] > 0 else "tau_neg"]
        weights.append(sapo_weight(z[-1].exp(), tau))
    divisor = sum(n) if per_token else 3

    def mean(values):
        """Of lists of token values by sample, as the host's loss weighs them."""
        return float(torch.cat(values).mean() if per_token else sum(x.mean() for x in values) / 3)

    log_mean, log_square = mean(z), mean([x.square() for x in z])
    assert reported["ratio/log_mean"] / divisor == pytest.approx(log_mean)
    assert reported["ratio/log_square"] / divisor == pytest.approx(log_square)
    assert reported["ratio/log_var"] / divisor == pytest.approx(log_square - log_mean**2)
    assert reported["ratio/mean"] / divisor == pytest.approx(mean([x.exp() for x in z]))
    assert reported["sapo/weight_mean"] / divisor == pytest.approx(mean(weights))
    assert reported["pg_clipfrac"] / divisor == pytest.approx(1 - mean(weights))
    seq_var = [x.var(correction=0) for x in z]
    assert reported["sapo/seq_var"] / divisor == pytest.approx(float(sum(seq_var)) / 3)
    assert 0 < reported["sapo/bound_lhs"] < reported["sapo/bound_rhs"]
    assert reported["sapo/bound_violation_share"] == 0
    if per_token:
        log_var = expected.values()["ratio/log_var"]
        assert reported["ratio/log_var"] / divisor == pytest.approx(log_var)


def test_garbage_on_masked_tokens_and_huge_ratios(host):
    batch, logits = cases.a_batch()
    clean = gradient(run(host, batch, logits)[0], logits)
    for sample, token, value in ((1, 2, math.nan), (2, 0, math.inf)):
        assert batch["loss_masks"][sample][token] == 0
        batch["log_probs"][sample][token] = value
        batch["advantages"][sample][token] = math.nan
    loss, _ = run(host, batch, logits)
    assert loss.isfinite()
    torch.testing.assert_close(gradient(loss, logits), clean, rtol=0, atol=0)
    batch["log_probs"][0] -= 300
    batch["log_probs"][1] += 300
    loss, _ = run(host, batch, logits)
    assert loss.isfinite()
    assert gradient(loss, logits).isfinite().all()


def test_a_rank_without_tokens_keeps_its_graph(host):
    batch, logits = cases.a_batch()
    empty = {
        name: tuple(0 for _ in x) if name == "response_lengths" else x for name, x in batch.items()
    }
    for name in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages", "loss_masks"):
        empty[name] = [x[:0] for x in batch[name]]
    empty["unconcat_tokens"] = [x[:0] for x in batch["unconcat_tokens"]]
    loss, reported = run(host, empty, logits)
    assert loss == 0
    assert (gradient(loss, logits) == 0).all()
    assert all(math.isfinite(value) for value in reported.values())


def test_nothing_is_left_behind(host):
    batch, logits = cases.a_batch()
    args = cases.arguments(host)
    reducer = slime_standin.reducer(args, batch)
    original = slime_standin.compute_policy_loss
    before, _ = slime_standin.policy_loss_function(args, batch, logits, reducer)
    first, _ = run(host, batch, logits)
    again, _ = run(host, batch, logits)
    with pytest.raises(KeyError):
        run(host, {"loss_masks": [], "total_lengths": (), "response_lengths": ()}, logits)
    after, _ = slime_standin.policy_loss_function(args, batch, logits, reducer)
    assert slime_standin.compute_policy_loss is original
    assert before == after
    assert first == again != before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"advantage_estimator": "gspo"}, "--advantage-estimator: expected grpo .* got gspo"),
        ({"advantage_estimator": "cispo"}, "--advantage-estimator: expected grpo .* got cispo"),
        ({"eps_clip_c": 3.0}, "--eps-clip-c: expected none, got 3.0"),
        ({"tau_pos": 0}, "tau_pos, tau_neg: expected two numbers > 0 .* got 0, 1.7"),
        ({"tau_neg": "1.05"}, "tau_pos, tau_neg: expected two numbers > 0 .* got 1.3, '1.05'"),
        ({"tau_neg": math.inf}, "tau_pos, tau_neg: expected two numbers > 0 .* got 1.3, inf"),
    ],
)
def test_refuses(host, changed, message):
    with pytest.raises(UserError, match=message):
        run(host, *cases.a_batch(), **changed)


def test_temperatures_that_nobody_gave_are_the_papers():
    args = cases.arguments("slime")
    del args.tau_pos, args.tau_neg
    assert slime.temperatures_of(args) == Temperatures(1.0, 1.05)


def test_another_version(host, monkeypatch):
    monkeypatch.setattr(sys.modules[host], "__version__", "0.0.9")
    with pytest.raises(UserError, match=f"{host}: expected .* or later, got 0.0.9; update it"):
        run(host, *cases.a_batch())


def test_a_symbol_that_is_missing_or_differs(host, monkeypatch):
    monkeypatch.setattr(slime_standin, "compute_policy_loss", lambda ppo_kl, advantages: None)
    with pytest.raises(UserError, match=r"compute_policy_loss: expected the parameters \(ppo_kl"):
        run(host, *cases.a_batch())
    monkeypatch.delattr(slime_standin, "compute_policy_loss")
    with pytest.raises(UserError, match=rf"compute_policy_loss: expected it in {host}"):
        run(host, *cases.a_batch())


def test_a_host_that_computes_its_loss_elsewhere(host, monkeypatch):
    def policy_loss_function(args, batch, logits, sum_of_sample_mean):
        return logits.sum(), {}

    monkeypatch.setattr(slime_standin, "policy_loss_function", policy_loss_function)
    with pytest.raises(UserError, match="expected one call of compute_policy_loss, got 0"):
        run(host, *cases.a_batch())


def split_over_ranks(host, per_token):
    """Of a rank: its gradient of the loss, and the metrics that it reports."""
    slime_standin.stand_in(host, sys.modules.__setitem__)
    batch, logits = cases.a_batch()
    for name in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages"):
        samples = zip(batch[name], cases.TOTAL, cases.RESPONSE, strict=True)
        batch[name] = [slime_standin.slice_log_prob_with_cp(*sample) for sample in samples]
    changed = {**cases.EVERYTHING, "calculate_per_token_loss": per_token}
    loss, reported = run(host, batch, logits, **changed)
    return gradient(loss, logits), reported


@pytest.mark.parametrize("per_token", [False, True])
def test_context_parallel_ranks_add_up(per_token):
    ranks = gloo.run_ranks(2, split_over_ranks, "slime", per_token)
    batch, logits = cases.a_batch()
    changed = {**cases.EVERYTHING, "calculate_per_token_loss": per_token}
    denominator = int(sum(batch["rollout_mask_sums"])) if per_token else len(cases.TOTAL)
    expected = gradient(cases.ours(batch, logits, **changed)[0], logits)
    torch.testing.assert_close(
        sum(grad for grad, _ in ranks) / denominator, expected, rtol=1e-12, atol=1e-14
    )
    with pytest.MonkeyPatch.context() as patch:
        slime_standin.stand_in("slime", lambda *at: patch.setitem(sys.modules, *at))
        slime.ready.cache_clear()
        _, whole = run("slime", batch, logits, **changed)
    for name, value in whole.items():
        total = sum(reported[name] for _, reported in ranks)
        assert total == pytest.approx(value, rel=1e-9, abs=1e-12), name


# The hosts themselves.

CHECKOUTS = {"slime": "SAPO_SLIME", "miles": "SAPO_MILES"}


@pytest.fixture(params=["slime", "miles"])
def checkout(request):
    path = os.environ.get(CHECKOUTS[request.param])
    if path is None:
        pytest.skip(f"{CHECKOUTS[request.param]} names no checkout of {request.param}")
    return request.param, path


def start_real(host, path):
    """Imports the host's modules, in the process of a rank, over megatron-core's own groups."""
    sys.path.insert(0, path)
    absent.stand_in_for(["ray", "sglang"])
    from megatron.core import mpu

    mpu.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    if host == "miles":
        from miles.backends.training_utils import parallel
        from miles.utils.ft_utils.process_group_utils import GroupInfo

        one = GroupInfo(rank=0, size=1, group=None)
        cp = GroupInfo(
            rank=dist.get_rank(), size=dist.get_world_size(), group=mpu.get_context_parallel_group()
        )
        tp = GroupInfo(rank=0, size=1, group=mpu.get_tensor_model_parallel_group())
        parallel.set_parallel_state(
            parallel.ParallelState(
                intra_dp=one, intra_dp_cp=cp, cp=cp, tp=tp, pp=one, ep=one, etp=one, indep_dp=one
            )
        )


def real_step(host, micro_batches, changed, spoil):
    """On the host itself: the gradient of a step's loss, and its metrics as the host reduces them.

    Its dispatcher finds the patch by the path in the arguments; the reductions are its own too.
    """
    package = {"slime": "slime.backends.megatron_utils", "miles": "miles.backends.training_utils"}
    loss = importlib.import_module(f"{package[host]}.loss")
    cp_utils = importlib.import_module(f"{package[host]}.cp_utils")
    args = cases.arguments(host, **changed)
    ranks, per_token = dist.get_world_size(), args.calculate_per_token_loss
    batch, logits = cases.a_batch(torch.float32)
    tokens = int(sum(batch["rollout_mask_sums"]))
    if spoil is not None:
        spoil(batch)
    reports, total = [], 0.0
    for indices in micro_batches:
        pieces = [cases.one(batch, logits, i) for i in indices]
        cut = {name: [x for piece, _ in pieces for x in piece[name]] for name in batch}
        rows = [x[0] for _, x in pieces]
        if ranks > 1:
            if not args.allgather_cp:
                rows = [cp_utils.slice_with_cp(x, 0.0) for x in rows]
            for name in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages"):
                samples = zip(cut[name], cut["total_lengths"], cut["response_lengths"], strict=True)
                cut[name] = [cp_utils.slice_log_prob_with_cp(*sample) for sample in samples]
        local, count = torch.cat(rows)[None], len(micro_batches)
        if args.allgather_cp:
            local = local.chunk(ranks, 1)[dist.get_rank()]
        if host == "slime":
            scaled, _, report = loss.loss_function(args, cut, count, len(cases.TOTAL), local)
        else:
            scaled, _, report = loss.loss_function(
                args, cut, count, local, True, num_rollouts=len(cases.TOTAL)
            )
        # What megatron-core's schedule and gradient reduction do to it.
        total = total + scaled / (ranks * (tokens if per_token else count))
        reports.append(report)
    if host == "slime":
        from megatron.core import mpu
        from slime.observability.train_metric_utils import reduce_train_step_metrics

        metrics = reduce_train_step_metrics(
            reports,
            calculate_per_token_loss=per_token,
            step_global_batch_size=len(cases.TOTAL),
            cp_size=ranks,
            dp_with_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        )
    else:
        log_utils = importlib.import_module("miles.backends.training_utils.log_utils")
        metrics = log_utils.aggregate_train_losses(reports, None if per_token else len(cases.TOTAL))
    total.backward()
    dist.all_reduce(logits.grad)
    return logits.grad, metrics


def spoil(batch):
    for sample, token in ((1, 2), (2, 0)):
        batch["log_probs"][sample][token] = math.nan
        batch["advantages"][sample][token] = math.nan
    batch["log_probs"][0] -= 300


GRPO = {"loss_type": "policy_loss"}
CUTS = (((0, 1, 2),), ((0,), (1, 2)))
STEPS = {
    "grpo before": (CUTS[0], GRPO, None),
    **{
        (cut, per_token): (
            CUTS[cut],
            {**cases.EVERYTHING, "calculate_per_token_loss": per_token},
            None,
        )
        for cut in (0, 1)
        for per_token in (False, True)
    },
    "recomputed": (CUTS[0], {**cases.EVERYTHING, "recompute_loss_function": True}, None),
    "contiguous": (CUTS[0], {**cases.EVERYTHING, "allgather_cp": True}, None),
    "sequences masked": (CUTS[0], {"use_opsm": True}, None),
    "spoilt": (CUTS[0], {}, spoil),
    "grpo after": (CUTS[0], GRPO, None),
}


def real_steps(host, path):
    start_real(host, path)
    replace.check(PATCHES[host].HOST)
    home = Path(next(iter(sys.modules[host].__path__)))
    assert home.is_relative_to(path)
    return {name: real_step(host, *step) for name, step in STEPS.items()}


@functools.cache
def on_ranks(host, path, ranks):
    return gloo.run_ranks(ranks, real_steps, host, path)[0]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_host_is_ours(checkout, ranks, cut, per_token):
    grad, metrics = on_ranks(*checkout, ranks)[cut, per_token]
    batch, logits = cases.a_batch(torch.float32)
    changed = {**cases.EVERYTHING, "calculate_per_token_loss": per_token}
    expected, own = cases.ours(batch, logits, **changed)
    # miles' log-probs are megatron-core's fused cross entropy, whose gradient is rounded to bf16.
    close = {"rtol": 8e-3, "atol": 2e-5} if checkout[0] == "miles" else {"rtol": 2e-5, "atol": 2e-7}
    torch.testing.assert_close(grad, gradient(expected, logits), **close)
    values = own.values()
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert metrics["pg_loss"] == pytest.approx(values["actor/pg_loss"], rel=1e-4)
    assert metrics["kl_loss"] == pytest.approx(values["actor/kl_loss"], rel=1e-4)
    assert metrics["tis"] > 0
    assert 0 < metrics["sapo/bound_lhs"] < metrics["sapo/bound_rhs"]
    if per_token:
        for name in ("ratio/mean", "sapo/gate_mean", "sapo/weight_mean"):
            assert metrics[name] == pytest.approx(values[name], rel=1e-4), name
        moments = metrics["ratio/log_square"] - metrics["ratio/log_mean"] ** 2
        assert moments == pytest.approx(values["ratio/log_var"], rel=1e-4)


def test_real_metrics_do_not_depend_on_the_cut(checkout):
    seen = [on_ranks(*checkout, ranks)[cut, False][1] for ranks in (1, 2) for cut in (0, 1)]
    for other in seen[1:]:
        for name in seen[0].keys() - {"ratio/log_var"}:
            assert other[name] == pytest.approx(seen[0][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["recomputed", "contiguous"])
def test_real_host_in_other_ways(checkout, ranks, name):
    """The loss recomputed in the backward pass; ranks with contiguous parts of the sequences."""
    steps = on_ranks(*checkout, ranks)
    torch.testing.assert_close(steps[name][0], steps[0, False][0], rtol=1e-4, atol=1e-6)
    assert steps[name][1] == pytest.approx(steps[0, False][1], rel=1e-4, abs=1e-6)


def test_real_host_masks_sequences(checkout):
    """With off-policy sequence masking, a sequence of a negative advantage may teach nothing."""
    grad, metrics = on_ranks(*checkout, 1)["sequences masked"]
    assert "opsm_clipfrac" in metrics
    assert grad.isfinite().all()


def test_real_host_with_garbage_and_huge_ratios(checkout):
    grad, metrics = on_ranks(*checkout, 1)["spoilt"]
    assert grad.isfinite().all()
    assert math.isfinite(metrics["pg_loss"])


def test_real_grpo_is_untouched(checkout):
    steps = on_ranks(*checkout, 1)
    assert torch.equal(steps["grpo before"][0], steps["grpo after"][0])
    assert steps["grpo before"][1] == steps["grpo after"][1]
    assert not torch.equal(steps["grpo after"][0], steps[0, False][0])
