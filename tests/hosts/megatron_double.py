"""What the patch for Megatron-LM's own GRPO must do, on two ranks; of the host or a double.

The double has the host's exact signatures and its arithmetic: what is checked against it is our
translation. Rows are sequences; a micro-batch is some of them, padded or packed into one bin.
"""

import contextlib
import functools
import importlib
import math
import sys
import traceback
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing import assert_close

from sapo_megatron.errors import UserError
from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.loss import gate_metrics, policy_loss, ratio_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.patches import megatron_rl, replace
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig
from sapo_megatron.sample import Denominators, PackedBatch

SAPO = AlgorithmConfig(tau_pos=1.1, tau_neg=1.4, kl_coef=0.03)
LENGTH = 12
"""Tokens of the longest sequence."""
GAP = 2
"""Padding behind each sequence of a bin."""
CAP = 1.5


@dataclass
class Rows:
    """N sequences; entry t of ``[N, LENGTH - 1]`` speaks of token t + 1."""

    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    inference: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    tokens: list[int]
    """How many each sequence has, prompt and response."""

    def select(self, rows):
        picked = [getattr(self, n)[rows] for n in self.__annotations__ if n != "tokens"]
        return Rows(*picked, [self.tokens[i] for i in rows])


def some_rows(n=6, seed=0, spread=0.4):
    torch.manual_seed(seed)
    tokens = [LENGTH - i % 4 for i in range(n)]
    mask = torch.zeros(n, LENGTH - 1, dtype=torch.bool)
    for i, length in enumerate(tokens):
        mask[i, 2 + i % 3 : length - 1] = True
    mask[3] = False  # a failed episode: nothing to train
    logprobs = -torch.rand(n, LENGTH - 1, dtype=torch.float64) * 4 - 0.01
    noise = torch.randn(3, n, LENGTH - 1, dtype=torch.float64) * spread
    return Rows(
        logprobs.requires_grad_(),
        *(logprobs.detach() + noise),
        torch.randn(n).double(),
        mask,
        tokens,
    )


def ours(rows, algorithm, with_correction):
    """Loss, gradient to ``rows.logprobs`` and metrics of all rows as one batch."""
    count, width = rows.mask.shape
    ids = torch.arange(count).repeat_interleave(width)
    nothing = torch.zeros(count * width, dtype=torch.int64)
    batch = PackedBatch(
        tokens=nothing,
        targets=nothing,
        mask=rows.mask.flatten(),
        position_ids=nothing,
        sequence_ids=ids,
        cu_seqlens=torch.arange(0, count * width + 1, width, dtype=torch.int32),
        max_seqlen=width,
        lengths=rows.mask.sum(1),
        advantages=rows.advantages[ids],
        rollout_logprob=rows.inference.flatten(),
        sample_uids=(),
        old_logprob=rows.old.flatten(),
        ref_logprob=rows.ref.flatten(),
    )
    sizes = Denominators(sequences=int(rows.mask.any(1).sum()), tokens=int(rows.mask.sum()))
    correction = CorrectionConfig(rollout_is="tis", tis_cap=CAP) if with_correction else None
    loss, _ = policy_loss(
        batch,
        rows.logprobs.flatten(),
        None,
        algorithm=algorithm,
        denominators=sizes,
        max_response_length=width,
        correction=correction,
    )
    (gradient,) = torch.autograd.grad(loss, rows.logprobs)
    log_ratio = (rows.logprobs - rows.old).detach().flatten()
    r = Ratio.of(log_ratio, batch.advantages, batch.mask)
    taus = {"tau_pos": algorithm.tau_pos, "tau_neg": algorithm.tau_neg}
    metrics = Metrics()
    metrics.update(ratio_metrics(r))
    metrics.update(gate_metrics(r, **taus))
    metrics.update(bound_metrics(r, ids, batch.lengths, **taus))
    return loss.detach(), gradient, metrics.values()


# The double: signatures and arithmetic of Megatron-LM 0.20.0.


def _stand_in_modules():
    rl, training = ModuleType("megatron.rl.rl_utils"), ModuleType("megatron.training")
    loop = ModuleType("megatron.training.training")
    state = SimpleNamespace(packing_context=None)

    def calculate_grpo_loss(
        current_logprobs,
        old_logprobs,
        ref_logprobs,
        advantages,
        clamp_eps_lower,
        clamp_eps_upper,
        kl_beta,
        entropy_weight,
        inference_logprobs=None,
        is_truncation_coef=None,
        seq_starts=None,
        seq_lengths=None,
    ):
        ratio = (current_logprobs - old_logprobs).exp()
        if seq_starts is None:
            advantages = advantages.view(-1, 1)
        else:
            spread = torch.zeros_like(current_logprobs)
            for start, length, a in zip(seq_starts, seq_lengths, advantages, strict=False):
                spread[0, start : start + length - 1] = a
            advantages = spread
        d = ref_logprobs - current_logprobs
        kl, entropy = d.exp() - d - 1, -current_logprobs.exp() * current_logprobs
        weight = torch.ones(())
        if inference_logprobs is not None:
            weight = (old_logprobs - inference_logprobs).exp().clamp(max=is_truncation_coef)
        clipped = ratio.clamp(1 - clamp_eps_lower, 1 + clamp_eps_upper)
        policy = torch.min(ratio * advantages, clipped * advantages)
        loss = -weight * policy + kl_beta * kl - entropy_weight * entropy
        above, below = ratio > 1 + clamp_eps_upper, ratio < 1 - clamp_eps_lower
        return loss, kl, ratio, entropy, above, below

    def prepare_trajectories(rows, tokenizer, seq_length, skip_bos_token):
        return None, torch.stack(rows), None

    def selective_log_softmax(logits, index):
        return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def get_logprobs(
        model, tokens, position_ids, no_grad=False, sequence_packing=False, packed_seq_params=None
    ):
        logits = model(
            tokens,
            position_ids,
            None,
            packed_seq_params=packed_seq_params,
            runtime_gather_output=True,
            fp32_output=False,
        )
        return rl.selective_log_softmax(logits[:, :-1], tokens[:, 1:])

    def compute_logprobs_batch(
        model,
        data_loader,
        forward_backward_func,
        packing_context,
        trajs_batch_size,
        seq_length,
        logprobs_batch_size,
        decoder_seq_length,
        dtype,
        pp_group,
        is_correction,
        collect_non_loss_data=False,
    ):
        return dtype

    def pretrain(
        cfg_container,
        train_valid_test_dataset_provider,
        model_type,
        forward_step_func,
        model_provider=None,
        process_non_loss_data_func=None,
        get_embedding_ranks=None,
        get_position_embedding_ranks=None,
        non_loss_data_func=None,
        store=None,
        inprocess_call_wrapper=None,
        p2p_communicator=None,
        pg_collection=None,
        skip_model_parallel_init=False,
    ):
        """Its signature is all that is used: see ``_with_recorders``."""

    def train_step(
        forward_step_func,
        data_iterator,
        model,
        optimizer,
        opt_param_scheduler,
        config,
        forward_backward_func,
        iteration=None,
        pg_collection=None,
        p2p_communicator=None,
    ):
        """Its signature is all that is used: see ``_with_recorders``."""

    for function in (
        *(calculate_grpo_loss, prepare_trajectories, selective_log_softmax, get_logprobs),
        compute_logprobs_batch,
    ):
        setattr(rl, function.__name__, function)
    rl.get_rl_runtime_state = lambda: state
    arguments = SimpleNamespace(
        calculate_per_token_loss=False, micro_batch_size=0, batch_invariant_mode=False
    )
    training.get_args = lambda: arguments
    training.pretrain, loop.train_step = pretrain, train_step
    parent = ModuleType("megatron.rl")
    parent.__path__ = []
    training.__path__ = []
    return {m.__name__: m for m in (parent, rl, training, loop)}


def _stand_in_script(rl):
    """The part of ``train_rl.py`` that computes a loss, as it is when imported now."""
    calculate = rl.calculate_grpo_loss

    def loss_func(
        loss_mask,
        kl_term,
        ratios,
        entropy_term,
        truncated_from_above,
        truncated_from_below,
        output_tensor,
    ):
        mask = loss_mask.float().flatten()
        total, tokens = (output_tensor.flatten() * mask).sum(), mask.sum().clamp(min=1)
        pair = torch.stack([total.detach(), tokens])
        return total, tokens.int(), {"lm loss": pair}

    def forward_step(data_iterator, model, loss_only=False):
        batch = next(data_iterator)
        loss, *rest = calculate(
            current_logprobs=model(),
            old_logprobs=batch.old,
            ref_logprobs=batch.ref,
            advantages=batch.advantages,
            clamp_eps_lower=0.2,
            clamp_eps_upper=0.2,
            kl_beta=SAPO.kl_coef,
            entropy_weight=0.0,
            inference_logprobs=batch.inference,
            is_truncation_coef=CAP,
            seq_starts=batch.starts,
            seq_lengths=batch.lengths,
        )
        return loss, functools.partial(loss_func, batch.mask.float(), *rest)

    return SimpleNamespace(forward_step=forward_step)


class StandIn:
    real = False

    def __init__(self):
        import megatron.core

        megatron.core.__version__ = megatron_rl.HOST.verified
        sys.modules.update(_stand_in_modules())
        self.rl = sys.modules["megatron.rl.rl_utils"]
        self.training = sys.modules["megatron.training"]
        self.loop = sys.modules["megatron.training.training"]
        self.arguments = self.training.get_args()
        self.state = self.rl.get_rl_runtime_state()

    def script(self):
        return _stand_in_script(self.rl)

    def run(self, step, batch):
        """One call of the script's ``forward_step``, on log-probs that are there."""
        return step(iter([batch]), lambda: batch.logprobs)

    def collect(self, masks, bins):
        self.rl.prepare_trajectories(list(masks), None, LENGTH, False)
        self.state.packing_context = bins and SimpleNamespace(packed_trajs=bins)


class Real:
    """A checkout of Megatron-LM, first on the path. Replaced here is what needs a GPU."""

    real = True

    def __init__(self):
        torch.Tensor.cuda = lambda self, *args, **kwargs: self
        self.rl = importlib.import_module("megatron.rl.rl_utils")
        self.training = importlib.import_module("megatron.training")
        self.loop = importlib.import_module("megatron.training.training")
        self.state = self.rl.get_rl_runtime_state()
        self.arguments = SimpleNamespace(
            calculate_per_token_loss=False,
            micro_batch_size=0,
            batch_invariant_mode=False,
            rl_use_sequence_packing=False,
            rl_inference_logprobs_is_correction=True,
            grpo_clamp_eps_lower=0.2,
            grpo_clamp_eps_upper=0.2,
            grpo_kl_beta=SAPO.kl_coef,
            grpo_entropy_term_weight=0.0,
            rl_importance_sampling_truncation_coef=CAP,
            check_for_nan_in_loss_and_grad=False,
            check_for_spiky_loss=False,
            fp16=False,
            bf16=False,
        )
        variables = importlib.import_module("megatron.training.global_vars")
        variables.set_args(self.arguments)
        timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
        variables._GLOBAL_TIMERS = lambda *args, **kwargs: timer

    def script(self):
        return importlib.import_module("train_rl")

    def run(self, step, batch):
        script = sys.modules["train_rl"]
        script.get_logprobs = lambda *args, **kwargs: batch.logprobs
        script.is_pipeline_last_stage = lambda: True
        n, width = batch.mask.shape
        tokens = torch.zeros(n, width + 1, dtype=torch.int64)
        mask = torch.cat([torch.zeros(n, 1), batch.mask.float()], 1)
        self.arguments.rl_use_sequence_packing = batch.starts is not None
        inference = batch.inference
        self.arguments.rl_inference_logprobs_is_correction = inference is not None
        if batch.starts is None:
            if inference is None:
                inference = torch.zeros_like(batch.old)
            data = (tokens, batch.advantages, batch.old, mask, tokens, batch.ref, inference)
            return step(iter([data]), torch.nn.Identity())
        from megatron.rl import sequence_packing_utils as packing

        info = packing.PackingInfo(
            bin_seq_indices=[list(range(len(batch.lengths)))],
            seq_starts={0: batch.starts},
            seq_lengths=batch.lengths,
            seq_to_bin_idx=[0] * len(batch.lengths),
            packing_algo="fifo",
        )
        context = packing.PackingContext(
            bin_size=width + 1,
            packer=None,
            packing_info=info,
            original_generation_masks=None,
            original_trajs=None,
            packed_trajs=tokens,
            packed_position_ids=tokens,
            packed_loss_mask=mask,
            bin_advantages=[batch.advantages],
            cached_packed_seq_params=[SimpleNamespace()],
        )
        context.old_logprobs, context.ref_logprobs = batch.old, batch.ref
        context.packed_inference_logprobs = inference
        held, self.state.packing_context = self.state.packing_context, context
        # One bin of the collection at a time: the patch counts all of them.
        context.packed_trajs = held.packed_trajs
        try:
            return step(iter([(torch.tensor(0),)]), torch.nn.Identity())
        finally:
            self.state.packing_context = held

    def collect(self, masks, bins):
        tokenizer = SimpleNamespace(
            library="other", pad=0, eod=9, bos=None, vocab_size=10, detokenize=str
        )
        row = self.rl.TokenRollout
        rollouts = [
            row(
                trajectory=[[1] * LENGTH],
                generation_mask=[mask.tolist()],
                logprobs=[[-1.0] * int(mask.sum())],
                reward=[0.0],
                env_id="x",
            )
            for mask in masks
        ]
        self.rl.prepare_trajectories(rollouts, tokenizer, LENGTH, False)
        self.state.packing_context = bins and SimpleNamespace(
            packed_trajs=torch.zeros(len(bins), sum(len(b) for b in bins) * (LENGTH + GAP))
        )


@dataclass
class Batch:
    """A micro-batch as the host's loss takes it."""

    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    inference: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor
    starts: list[int] | None = None
    lengths: list[int] | None = None


def padded(rows, corrected):
    inference = rows.inference if corrected else None
    return Batch(rows.logprobs, rows.old, rows.ref, inference, rows.advantages, rows.mask)


def packed(rows, corrected):
    """One bin, a gap behind each sequence, garbage that is finite where no sequence is."""
    size = sum(rows.tokens) + GAP * len(rows.tokens) - 1
    starts = [0]
    for tokens in rows.tokens:
        starts.append(starts[-1] + tokens + GAP)

    def lay(x, filler):
        laid = torch.full((1, size), filler, dtype=x.dtype)
        pieces, at = [], 0
        for i, (start, tokens) in enumerate(zip(starts, rows.tokens, strict=False)):
            pieces += [laid[:, at:start], x[i : i + 1, : tokens - 1]]
            at = start + tokens - 1
        return torch.cat([*pieces, laid[:, at:]], 1)

    inference = lay(rows.inference, -1.0) if corrected else None
    return Batch(
        lay(rows.logprobs, -1.0),
        lay(rows.old, -2.0),
        lay(rows.ref, -1.0),
        inference,
        rows.advantages,
        lay(rows.mask, False),
        starts,
        rows.tokens,
    )


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


# The checks. Every rank runs all of them, in order.

ONE_EACH = [[[0, 1, 2]], [[3, 4, 5]]]
UNEVEN = [[[0], [1], [2]], [[3], [5], [4]]]
BINS = [[[0, 5], [1]], [[2, 3], [4]]]


def check_host_is_untouched_when_sapo_is_off(host):
    rows = some_rows()
    before = train(host, rows, ONE_EACH, pack=False)
    megatron_rl.install(SAPO)
    megatron_rl.uninstall()
    after = train(host, rows, ONE_EACH, pack=False)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2].keys() == after[2].keys()
    assert not any(name.startswith("sapo/") for name in after[2])


def check_loss_and_gradient_are_ours(host):
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


def check_it_is_not_the_hosts_own_reduction(host):
    """Without the weights the mean would be by token, which these rows tell apart."""
    rows = some_rows()
    loss, *_ = ours(rows, SAPO, False)
    by_token, *_ = ours(
        rows, AlgorithmConfig(**{**vars(SAPO), "loss_agg_mode": "token-mean"}), False
    )
    assert abs(loss - by_token) > 1e-3


def check_entropy_term_is_the_hosts(host):
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


def check_overflow_is_safe(host):
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


def check_bf16_log_probs(host):
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


def check_twice_is_once_and_undo_restores(host):
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


def check_a_script_that_came_first(host):
    module = ModuleType("train_rl_before")
    module.calculate_grpo_loss = host.rl.calculate_grpo_loss
    sys.modules[module.__name__] = module
    try:
        error = refused(lambda: megatron_rl.install(SAPO))
    finally:
        del sys.modules[module.__name__]
    assert "before train_rl_before imports it" in error


def check_versions_and_symbols(host):
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


def check_a_collection_without_a_generated_token(host):
    rows = some_rows()
    rows.mask[:] = False
    megatron_rl.install(SAPO)
    loss, gradient, report = train(host, rows, ONE_EACH, pack=False)
    assert loss == 0
    assert not gradient.any()
    assert "sapo/gate_mean" not in report


def check_truncation_at_zero_and_none_at_all(host):
    rows = some_rows()
    megatron_rl.install(SAPO)
    given = (rows.logprobs, rows.old, rows.ref, rows.advantages, 0.2, 0.2, 0.0, 0.0)
    plain = host.rl.calculate_grpo_loss(*given)[0]
    inference = rows.old - 2.0  # a weight of e^2 for every token
    assert not host.rl.calculate_grpo_loss(*given, inference, 0.0)[0].any()
    assert_close(host.rl.calculate_grpo_loss(*given, inference, None)[0], plain * math.e**2)
    assert_close(host.rl.calculate_grpo_loss(*given, inference, 3.0)[0], plain * 3)


def check_another_reduction_is_refused(host):
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


def check_sharded_logprobs(host):
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


def check_collected_logprobs_are_in_fp32(host):
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


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}


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
    for name, check in CHECKS.items():
        try:
            check(host)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        finally:
            megatron_rl.uninstall()
    return found
