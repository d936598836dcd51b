"""What the patch for Megatron-LM's own GRPO must do, on two ranks; of the host or its double.

Every rank runs all of CHECKS, in order.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import traceback
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing import assert_close

from sapo_megatron.errors import UserError
from sapo_megatron.patches import megatron_rl, replace
from tests.hosts.megatron_checkout import Real
from tests.hosts.megatron_double import StandIn
from tests.hosts.megatron_rows import SAPO, ours, packed, padded, some_rows


def train(host, rows, split, *, pack, corrected=True):
    """Loss, gradient to ``rows.logprobs`` and report of a step, reduced as the host reduces.

    ``split``: the rows of each micro-batch of each rank. The rank's share is run through the
    script's ``forward_step``, and summed over the two ranks.
    """
    script = host.script()
    host.training.pretrain(None, None, None, script.forward_step)
    mine = split[dist.get_rank()]
    masks = torch.cat([torch.zeros(len(rows.mask), 1).bool(), rows.mask], 1)
    host.collect([masks[i] for batch in mine for i in batch], mine if pack else None)
    host.arguments.micro_batch_size = len(mine[0])
    microbatches = sys.modules["megatron.core.num_microbatches_calculator"]
    microbatches.get_num_microbatches = lambda: len(mine)

    total, reports = torch.zeros((), dtype=torch.float64), []
    for picked in mine:
        part = rows.select(picked)
        batch = packed(part, corrected) if pack else padded(part, corrected)
        output, loss_func = host.run(host.forward_step, batch)
        loss, num_tokens, report = loss_func(output)
        total = total + loss / num_tokens / len(mine)
        reports.append(report)
    (gradient,) = torch.autograd.grad(total, rows.logprobs)
    total = total.detach()
    dist.all_reduce(total)
    dist.all_reduce(gradient)
    host.reduced = {}
    for name in reports[0]:
        pair = torch.stack([report[name] for report in reports]).sum(0)
        dist.all_reduce(pair)
        host.reduced[name] = pair[0] / pair[1]
    report, *_ = host.loop.train_step(*[None] * 7)
    sys.modules.pop("train_rl", None)
    return total / 2, gradient / 2, report


def _with_recorders(host):
    """In the place of the host's loops, which need a cluster: what they are given is kept."""

    @functools.wraps(host.training.pretrain)
    def pretrain(cfg_container, provider, model_type, forward_step_func):
        host.forward_step = forward_step_func

    @functools.wraps(host.loop.train_step)
    def train_step(*args):
        return host.reduced, 0

    host.training.pretrain, host.loop.train_step = pretrain, train_step
    return host


# The checks

ONE_EACH = [[[0, 1, 2]], [[3, 4, 5]]]
UNEVEN = [[[0], [1], [2]], [[3], [5], [4]]]
BINS = [[[0, 5], [1]], [[2, 3], [4]]]


def host_is_untouched_when_sapo_is_off(host):
    rows = some_rows()
    before = train(host, rows, ONE_EACH, pack=False)
    megatron_rl.install(SAPO)
    megatron_rl.uninstall()
    after = train(host, rows, ONE_EACH, pack=False)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2].keys() == after[2].keys()
    assert not any(name.startswith("sapo/") for name in after[2])


def loss_and_gradient_are_ours(host):
    rows = some_rows()
    megatron_rl.install(SAPO)
    for corrected in (False, True):
        loss, gradient, metrics = ours(rows, SAPO, corrected)
        for split, pack in ((ONE_EACH, False), (UNEVEN, False), (BINS, True), (ONE_EACH, True)):
            found = train(host, rows, split, pack=pack, corrected=corrected)
            assert_close(found[0], loss, rtol=1e-6, atol=1e-7)
            assert_close(found[1], gradient, rtol=1e-6, atol=1e-9)
            report = found[2]
            assert_close(report["lm loss"].double(), loss, rtol=1e-5, atol=1e-6)
            names = [n for n in metrics if n.startswith(("ratio/", "sapo/"))]
            for name in set(names) - {"ratio/min", "ratio/max", "ratio/ess"}:
                assert math.isclose(
                    float(report[name]), metrics[name], rel_tol=2e-4, abs_tol=1e-6
                ), f"{name}: {float(report[name])}, expected {metrics[name]}"


def the_mean_is_over_sequences_and_not_the_hosts(host):
    """The host's own, over tokens, of the same token losses is another number."""
    rows = some_rows()
    megatron_rl.install(SAPO)
    found, *_ = train(host, rows, ONE_EACH, pack=False, corrected=False)
    given = (rows.logprobs, rows.old, rows.ref, rows.advantages, 0.2, 0.2, SAPO.kl_coef, 0.0)
    by_token = host.rl.calculate_grpo_loss(*given)[0][rows.mask].mean()
    expected, *_ = ours(rows, dataclasses.replace(SAPO, loss_agg_mode="token-mean"), False)
    assert_close(by_token.double(), expected, rtol=1e-6, atol=1e-7)
    assert abs(found - expected) > 1e-3


def entropy_term_is_the_hosts(host):
    rows = some_rows()
    arguments = {
        "advantages": rows.advantages,
        "clamp_eps_lower": 0.2,
        "clamp_eps_upper": 0.2,
        "kl_beta": 0.0,
        "ref_logprobs": rows.ref,
        "current_logprobs": rows.logprobs,
        "old_logprobs": rows.old,
    }
    theirs = host.rl.calculate_grpo_loss(entropy_weight=0.5, **arguments)
    megatron_rl.install(SAPO)
    with_term = host.rl.calculate_grpo_loss(entropy_weight=0.5, **arguments)
    without = host.rl.calculate_grpo_loss(entropy_weight=0.0, **arguments)
    assert_close(with_term[0] - without[0], -0.5 * theirs[3])
    for mine, host_one in zip(with_term[1:], theirs[1:], strict=True):
        assert_close(mine, host_one)


def overflow_is_safe(host):
    rows = some_rows()
    with torch.no_grad():
        rows.logprobs[0, 4] = 0.0
    rows.old[0, 4] = -900.0
    rows.advantages[0] = -1.0
    _, gradient, _ = train(host, rows, ONE_EACH, pack=False, corrected=False)
    assert not gradient.isfinite().all(), "GRPO overflows, or this shows nothing"
    megatron_rl.install(SAPO)
    loss, gradient, _ = train(host, rows, ONE_EACH, pack=False, corrected=False)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def bf16_log_probs(host):
    rows = some_rows()
    megatron_rl.install(SAPO)
    six = host.rl.calculate_grpo_loss(
        rows.logprobs.bfloat16(),
        rows.old.bfloat16(),
        rows.ref.bfloat16(),
        rows.advantages.bfloat16(),
        0.2,
        0.2,
        0.0,
        0.0,
    )
    assert six[0].dtype == torch.float32


def twice_is_once_and_undo_restores(host):
    own = {s: replace.find(megatron_rl.HOST, s) for s in megatron_rl.HOST.symbols}
    rows = some_rows()
    megatron_rl.install(SAPO)
    once = train(host, rows, ONE_EACH, pack=False)
    megatron_rl.install(SAPO, vocab_parallel_logprobs=True)
    megatron_rl.install(SAPO, vocab_parallel_logprobs=True)
    twice = train(host, rows, ONE_EACH, pack=False)
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1], twice[1])
    megatron_rl.uninstall()
    megatron_rl.uninstall()
    assert own == {s: replace.find(megatron_rl.HOST, s) for s in megatron_rl.HOST.symbols}
    for symbol, function in own.items():
        assert getattr(sys.modules[symbol.module], symbol.name) is function


def a_script_that_came_first(host):
    module = ModuleType("train_rl_before")
    module.calculate_grpo_loss = host.rl.calculate_grpo_loss
    sys.modules[module.__name__] = module
    try:
        error = refused(lambda: megatron_rl.install(SAPO))
    finally:
        del sys.modules[module.__name__]
    assert "before train_rl_before imports it" in error


def versions_and_symbols(host):
    core = sys.modules["megatron.core"]
    held = core.__version__
    try:
        core.__version__ = "0.19.9"
        assert "expected 0.20.0 or later, got 0.19.9" in refused(lambda: megatron_rl.install(SAPO))
        core.__version__ = "0.99.0"
        megatron_rl.install(SAPO)  # newer, and its functions still fit
        megatron_rl.uninstall()
    finally:
        core.__version__ = held
    own = host.rl.calculate_grpo_loss
    try:
        host.rl.calculate_grpo_loss = lambda logprobs, advantages: None
        error = refused(lambda: megatron_rl.install(SAPO))
        assert "megatron.rl.rl_utils.calculate_grpo_loss" in error
        assert "(logprobs, advantages)" in error
        assert f"Megatron-LM {held}" in error
        del host.rl.calculate_grpo_loss
        assert "calculate_grpo_loss" in refused(lambda: megatron_rl.install(SAPO))
    finally:
        host.rl.calculate_grpo_loss = own
    assert host.rl.prepare_trajectories.__module__ != megatron_rl.__name__


def a_collection_without_a_generated_token(host):
    rows = some_rows()
    rows.mask[:] = False
    megatron_rl.install(SAPO)
    loss, gradient, report = train(host, rows, ONE_EACH, pack=False)
    assert loss == 0
    assert not gradient.any()
    assert "sapo/gate_mean" not in report


def truncation_at_zero_and_none_at_all(host):
    rows = some_rows()
    megatron_rl.install(SAPO)
    given = (rows.logprobs, rows.old, rows.ref, rows.advantages, 0.2, 0.2, 0.0, 0.0)
    plain = host.rl.calculate_grpo_loss(*given)[0]
    inference = rows.old - 2.0  # a weight of e^2 for every token
    assert not host.rl.calculate_grpo_loss(*given, inference, 0.0)[0].any()
    assert_close(host.rl.calculate_grpo_loss(*given, inference, None)[0], plain * math.e**2)
    assert_close(host.rl.calculate_grpo_loss(*given, inference, 3.0)[0], plain * 3)


def another_reduction_is_refused(host):
    rows = some_rows()
    megatron_rl.install(SAPO)
    host.arguments.calculate_per_token_loss = True
    try:
        error = refused(lambda: train(host, rows, ONE_EACH, pack=False))
    finally:
        host.arguments.calculate_per_token_loss = False
    assert "--calculate-per-token-loss" in error
    step = megatron_rl._Sapo(SAPO)

    def forward_step(iterator, model):
        out = host.rl.calculate_grpo_loss(
            rows.logprobs, rows.old, rows.ref, rows.advantages, 0.2, 0.2, 0.0, 0.0
        )
        step.micro_batch = "set"
        return out[0], functools.partial(lambda loss_mask, output: None, rows.mask)

    error = refused(lambda: step.stepping(forward_step)(None, None))
    assert "loss_func of the script" in error
    assert "got (loss_mask, output) with 1 bound" in error


def sharded_logprobs(host):
    """Of two tensor-parallel ranks: the host's own, and ours from half the vocabulary each."""
    torch.manual_seed(1)
    rank = dist.get_rank()
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    weight = torch.randn(8, 20, dtype=torch.float64)
    tokens = torch.randint(0, 20, (2, 5))
    sum_of = torch.rand(2, 4, dtype=torch.float64)

    class Model(torch.nn.Module):
        """Its last layer alone, whose weights are sharded by column."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight[:, rank * 10 : rank * 10 + 10].clone())
            group = dist.group.WORLD
            self.pg_collection = SimpleNamespace(
                tp=group, cp=dist.new_group([rank], use_local_synchronization=True), pp=None
            )
            self.config = SimpleNamespace(flash_decode=False)
            self.widths = []

        def forward(
            self,
            tokens,
            position_ids,
            attention_mask,
            packed_seq_params=None,
            runtime_gather_output=None,
            fp32_output=True,
        ):
            logits = hidden @ self.weight
            if runtime_gather_output:
                parts = torch.distributed.nn.functional.all_gather(logits, group=dist.group.WORLD)
                logits = torch.cat(parts, -1)
            self.widths.append(logits.shape[-1])
            return logits

    model = Model()
    if host.real:
        model.pg_collection.pp = model.pg_collection.cp
        host.rl.get_nvtx_range = lambda: lambda *args, **kwargs: contextlib.nullcontext()

    def logprobs():
        model.zero_grad()
        found = host.rl.get_logprobs(model, tokens, None, packed_seq_params=SimpleNamespace())
        (found * sum_of).sum().backward()
        return found.detach(), model.weight.grad.clone()

    theirs, their_gradient = logprobs()
    megatron_rl.install(SAPO, vocab_parallel_logprobs=True)
    found, gradient = logprobs()
    assert model.widths == [20, 10]
    assert_close(found, theirs)
    # The host's gather adds the gradient of each of the two ranks to the other's.
    assert_close(gradient * 2, their_gradient)
    assert not model._forward_pre_hooks
    host.arguments.batch_invariant_mode = True
    try:
        assert "--batch-invariant-mode" in refused(logprobs)
    finally:
        host.arguments.batch_invariant_mode = False


def collected_logprobs_are_in_fp32(host):
    """The host asserts their dtype, and makes room for them on other stages by it."""

    def schedule(**kwargs):
        return [torch.zeros(1, 4)]

    if host.real:
        host.rl.is_pp_last_stage = lambda group: True
        host.rl.get_pg_size = lambda group: 1
    megatron_rl.install(SAPO, vocab_parallel_logprobs=True)
    kept = host.rl.compute_logprobs_batch(
        None, [0], schedule, None, 1, 5, 1, None, torch.bfloat16, None, False
    )
    assert (kept.dtype if host.real else kept) == torch.float32


CHECKS = (
    host_is_untouched_when_sapo_is_off,
    loss_and_gradient_are_ours,
    the_mean_is_over_sequences_and_not_the_hosts,
    entropy_term_is_the_hosts,
    overflow_is_safe,
    bf16_log_probs,
    twice_is_once_and_undo_restores,
    a_script_that_came_first,
    versions_and_symbols,
    a_collection_without_a_generated_token,
    truncation_at_zero_and_none_at_all,
    another_reduction_is_refused,
    sharded_logprobs,
    collected_logprobs_are_in_fp32,
)


def refused(call):
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("expected a UserError")


def run_checks(real):
    """Name of each check -> None, or what went wrong. Every one starts without the patch."""
    parallel_state.initialize_model_parallel()
    host = _with_recorders(Real() if real else StandIn())
    found = {}
    for check in CHECKS:
        try:
            check(host)
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
        finally:
            megatron_rl.uninstall()
    return found
