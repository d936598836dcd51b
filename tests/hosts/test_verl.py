"""The policy loss in the real verl: its registry, its ppo_loss, its reduction of metrics."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verl
from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.utils.metric import Metric
from verl.utils.py_functional import append_to_dict
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from sapo_megatron.errors import UserError
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.objective.sapo import sapo_token_loss
from sapo_megatron.patches import verl as patch
from sapo_megatron.recipe.schema import AlgorithmConfig
from sapo_megatron.sample import Denominators, PackedBatch

ROOT = Path(__file__).parents[2]
PROMPT, LONGEST = 2, 6
MASKS = ("111", "1", "110111", "1111", "000", "11")
"""Of each response: a tool's answer in the middle of one, and one that teaches nothing."""
ADVANTAGES = (1.5, -2.0, 0.7, -0.4, 0.9, 0.0)
SEQUENCES, TOKENS = 5, 15
MODES = (
    "seq-mean-token-mean",
    "token-mean",
    "seq-mean-token-sum-norm",
    "seq-mean-token-sum",
    "token-sum",
)
SPLITS = {
    "whole": ([[0, 1, 2, 3, 4, 5]],),
    "micro-batches": ([[0], [1, 2], [3, 4, 5]],),
    "two ranks": ([[0, 1, 2]], [[3, 4, 5]]),
    "two ranks, micro-batches": ([[4], [1, 2]], [[3, 5], [0]]),
}
KEYS = {"old_log_probs": "old", "advantages": "advantages", "ref_log_prob": "ref"}


@pytest.fixture(autouse=True)
def registered():
    patch.install()
    yield
    patch.uninstall()


@pytest.fixture
def rows():
    """[B, LONGEST] each, fp64; ``logprob`` and ``entropy`` are leaves."""
    generator = torch.Generator().manual_seed(0)

    def noise(spread):
        shape = (len(MASKS), LONGEST)
        return spread * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = noise(0.5) - 2
    return {
        "mask": torch.tensor([[c == "1" for c in m.ljust(LONGEST, "0")] for m in MASKS]),
        "old": old,
        "ref": old + noise(0.2),
        "advantages": torch.tensor(ADVANTAGES).double()[:, None].expand(-1, LONGEST),
        "weights": noise(0.3).exp(),
        "logprob": (old + noise(0.4)).requires_grad_(),
        "entropy": (noise(0.3) + 2).requires_grad_(),
    }


def make_config(loss_mode="sapo_megatron", **options):
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        **{"tau_pos": 1.2, "tau_neg": 1.7, "loss_scale_factor": 8, **options},
    )


def run_verl(config, rows, chosen, *, dp_size=1, weighted=False, entropy=False):
    """verl's ppo_loss of the micro-batch of these rows, laid out as its engines do."""
    lengths = [len(MASKS[i]) for i in chosen]

    def nested(x):
        return torch.nested.as_nested_tensor(
            [x[i, :n] for i, n in zip(chosen, lengths, strict=True)], layout=torch.jagged
        )

    def of_model(x):
        """Of prompts and responses end to end; an entry speaks of the token after it."""
        zero = x.new_zeros(PROMPT - 1), x.new_zeros(1)
        pieces = [(zero[0], x[i, :n], zero[1]) for i, n in zip(chosen, lengths, strict=True)]
        return torch.cat([part for piece in pieces for part in piece])

    ids = torch.zeros(len(MASKS), LONGEST, dtype=torch.int64)
    data = {key: nested(rows[name]) for key, name in KEYS.items()}
    data |= {"response_mask": nested(rows["mask"]), "responses": nested(ids)}
    data["prompts"] = torch.nested.as_nested_tensor(
        [torch.zeros(PROMPT, dtype=torch.int64)] * len(chosen), layout=torch.jagged
    )
    if weighted:
        data["rollout_is_weights"] = nested(rows["weights"])
    data = TensorDict(data, batch_size=[len(chosen)])
    sizes = {"batch_num_tokens": TOKENS, "global_batch_size": SEQUENCES}
    tensordict_utils.assign_non_tensor(data, dp_size=dp_size, **sizes)
    output = {"log_probs": of_model(rows["logprob"])}
    if entropy:
        output["entropy"] = of_model(rows["entropy"])
    return ppo_loss(config, output, data)


def run_ours(rows, mode, *, taus=(1.2, 1.7), kl_coef=0.0, entropy_coef=0.0):
    """The loss of the whole batch by our own policy_loss."""
    mask, size = rows["mask"], rows["mask"].numel()
    zeros = torch.zeros(size, dtype=torch.int64)
    # The sums are the means times their denominators.
    same, factor = {
        "seq-mean-token-sum": ("seq-mean-token-sum-norm", 8),
        "token-sum": ("token-mean", TOKENS),
    }.get(mode, (mode, 1))
    batch = PackedBatch(
        tokens=zeros,
        targets=zeros,
        mask=mask.flatten(),
        position_ids=zeros,
        sequence_ids=torch.arange(len(mask)).repeat_interleave(LONGEST),
        cu_seqlens=torch.arange(0, size + 1, LONGEST, dtype=torch.int32),
        max_seqlen=LONGEST,
        lengths=mask.sum(1),
        advantages=rows["advantages"].flatten(),
        rollout_logprob=rows["old"].flatten(),
        sample_uids=tuple(range(len(mask))),
        old_logprob=rows["old"].flatten(),
        ref_logprob=rows["ref"].flatten() if kl_coef else None,
    )
    algorithm = AlgorithmConfig(
        tau_pos=taus[0],
        tau_neg=taus[1],
        loss_agg_mode=same,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
    )
    loss, _ = policy_loss(
        batch,
        rows["logprob"].flatten(),
        rows["entropy"].flatten() if entropy_coef else None,
        algorithm=algorithm,
        denominators=Denominators(sequences=SEQUENCES, tokens=TOKENS),
        max_response_length=8,
    )
    return loss * factor


def gradients(loss, rows):
    leaves = [rows["logprob"], rows["entropy"]]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def assert_same(loss, expected, rows):
    # verl divides by the length + 1e-8.
    torch.testing.assert_close(loss, expected, rtol=2e-8, atol=0)
    for got, wanted in zip(gradients(loss, rows), gradients(expected, rows), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-8, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_are_ours(mode, split, rows):
    config = make_config(loss_agg_mode=mode)
    ranks = SPLITS[split]
    losses = [
        run_verl(config, rows, chosen, dp_size=len(ranks))[0]
        for micro_batches in ranks
        for chosen in micro_batches
    ]
    # Data parallelism averages.
    assert_same(sum(losses) / len(ranks), run_ours(rows, mode), rows)


@pytest.mark.parametrize("mode", MODES[:3])
def test_kl_and_entropy_are_added_by_verl(mode, rows):
    config = make_config(loss_agg_mode=mode, use_kl_loss=True, kl_loss_coef=0.3, entropy_coeff=0.1)
    parts = [run_verl(config, rows, chosen, entropy=True) for chosen in SPLITS["micro-batches"][0]]
    expected = run_ours(rows, mode, kl_coef=0.3, entropy_coef=0.1)
    assert_same(sum(loss for loss, _ in parts), expected, rows)
    assert {"kl_loss", "actor/entropy_loss", "actor/pg_loss"} <= parts[0][1].keys()


def test_rollout_weights_multiply_the_token_losses(rows):
    loss, _ = run_verl(make_config(loss_agg_mode="token-mean"), rows, range(6), weighted=True)
    token_loss = sapo_token_loss(
        rows["logprob"] - rows["old"],
        rows["advantages"],
        tau_pos=1.2,
        tau_neg=1.7,
        mask=rows["mask"],
    )
    assert_same(loss, (token_loss * rows["weights"]).sum() / TOKENS, rows)


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_built_in_sapo(weighted, rows):
    """Which takes the sequence mean whatever the mode."""
    ours, theirs = (
        run_verl(
            make_config(mode, loss_agg_mode="seq-mean-token-mean"),
            rows,
            range(6),
            weighted=weighted,
        )[0]
        for mode in ("sapo_megatron", "sapo")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(gradients(ours, rows), gradients(theirs, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_padding_may_hold_anything_and_nothing_overflows(dtype, garbage):
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    old = torch.tensor([[-1.0, -1001.0, -1.0, garbage], [-2.0, garbage, 0.0, garbage]])
    logprob = torch.tensor([[-1.0, -1.0, -1001.0, -garbage], [-2.5, garbage, garbage, 0.0]])
    logprob = logprob.to(dtype).requires_grad_()
    config = make_config()
    loss, report = patch.policy_loss(
        old_log_prob=old.to(dtype),
        log_prob=logprob,
        advantages=torch.tensor([[1.0], [-1.0]]).masked_fill(~mask, garbage),
        response_mask=mask,
        loss_agg_mode="seq-mean-token-mean",
        config=config,
        rollout_is_weights=torch.full((2, 4), garbage).masked_fill(mask, 1.0),
    )
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    assert all(math.isfinite(value) for value in report.values())


def reduced(config, rows, ranks):
    """What verl's dashboard shows of a mini-batch."""
    of_ranks = []
    for micro_batches in ranks:
        metrics = {}
        for chosen in micro_batches:
            append_to_dict(metrics, run_verl(config, rows, chosen, dp_size=len(ranks))[1])
        of_ranks.append(metrics)
    names = of_ranks[0].keys()
    assert all(metrics.keys() == names for metrics in of_ranks)
    return {name: Metric.aggregate_dp([metrics[name] for metrics in of_ranks]) for name in names}


def test_metrics_of_one_micro_batch_are_exact(rows):
    found = reduced(make_config(), rows, SPLITS["whole"])
    log_ratio = (rows["logprob"] - rows["old"])[rows["mask"]].detach()
    assert found["ratio/log_mean"] == pytest.approx(log_ratio.mean().item())
    assert found["ratio/log_square"] == pytest.approx(log_ratio.square().mean().item())
    assert found["ratio/log_var"] == pytest.approx(log_ratio.var(correction=0).item())
    assert found["ratio/min"] == pytest.approx(log_ratio.exp().min().item())
    assert found["ratio/max"] == pytest.approx(log_ratio.exp().max().item())
    assert found["actor/ppo_kl"] == pytest.approx(-log_ratio.mean().item())
    positive = (rows["logprob"] - rows["old"])[rows["mask"] & (rows["advantages"] > 0)]
    gate = torch.sigmoid(1.2 * (positive.exp() - 1)) * 4 / 1.2
    assert found["sapo/gate_pos_mean"] == pytest.approx(gate.mean().item())
    assert found["sapo/bound_violations"] == 0
    assert 0 < found["sapo/bound_lhs"] <= found["sapo/bound_rhs"]
    wanted = {"sapo/gate_mean", "sapo/gate_neg_mean", "sapo/weight_mean", "sapo/gate_distance"}
    assert wanted | {"sapo/seq_var"} <= found.keys()


def test_metrics_are_means_over_micro_batches_and_ranks(rows):
    ranks = SPLITS["two ranks, micro-batches"]
    config = make_config()
    pieces = [[reduced(config, rows, ([chosen],)) for chosen in rank] for rank in ranks]
    found = reduced(config, rows, ranks)
    for name in set(pieces[0][0]) - {"actor/pg_loss"}:
        values = [piece[name] for rank in pieces for piece in rank]
        assert found[name] == pytest.approx(sum(values) / 4), name


def test_a_micro_batch_without_tokens_is_at_rest(rows):
    """Row 4 has no valid token, and 0 no negative advantage: no NaN reaches the mean."""
    found = reduced(make_config(), rows, ([[4]],))
    at_rest = {
        "ratio/mean": 1.0,
        "ratio/min": 1.0,
        "ratio/max": 1.0,
        "sapo/gate_mean": 2 / 1.2,
        "sapo/gate_pos_mean": 2 / 1.2,
        "sapo/gate_neg_mean": 2 / 1.7,
        "sapo/weight_mean": 1.0,
    }
    assert found == {name: at_rest.get(name, 0.0) for name in found}
    assert reduced(make_config(), rows, ([[0]],))["sapo/gate_neg_mean"] == 2 / 1.7


def test_verls_own_losses_stay_what_they_are(rows):
    patch.uninstall()
    before = dict(core_algos.POLICY_LOSS_REGISTRY)
    loss = run_verl(make_config("vanilla"), rows, range(6))[0]
    gradient = gradients(loss, rows)[0]
    patch.install()
    again = run_verl(make_config("vanilla"), rows, range(6))[0]
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradients(again, rows)[0])
    assert before | {patch.LOSS_MODE: patch.policy_loss} == core_algos.POLICY_LOSS_REGISTRY


def test_twice_is_as_once_and_uninstall_takes_it_out():
    patch.install()
    assert core_algos.get_policy_loss_fn("sapo_megatron") is patch.policy_loss
    patch.uninstall()
    with pytest.raises(ValueError, match="sapo_megatron"):
        core_algos.get_policy_loss_fn("sapo_megatron")
    patch.uninstall()


def test_does_not_overwrite_the_loss_of_another():
    patch.uninstall()

    def other():
        pass

    core_algos.register_policy_loss("sapo_megatron")(other)
    try:
        with pytest.raises(UserError, match="sapo_megatron: expected no policy loss of that name"):
            patch.install()
        patch.uninstall()
        assert core_algos.get_policy_loss_fn("sapo_megatron") is other
    finally:
        del core_algos.POLICY_LOSS_REGISTRY["sapo_megatron"]


@pytest.mark.parametrize(
    "seam",
    [
        "import verl",
        "from verl.workers.utils.losses import ppo_loss",
        "from verl.utils.import_utils import import_external_libs as load\n"
        "load('sapo_megatron.patches.verl')",
    ],
)
def test_loads_through_verls_seams(seam):
    program = f"""{seam}
from verl.trainer.ppo.core_algos import get_policy_loss_fn
assert get_policy_loss_fn("sapo_megatron").__module__ == "sapo_megatron.patches.verl"
"""
    by_name = {} if "load" in seam else {"VERL_USE_EXTERNAL_MODULES": "sapo_megatron.patches.verl"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **by_name}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr(verl, "__version__", "0.8.2")
    with pytest.raises(UserError, match=r"verl: expected 0\.9\.0 or later, got 0\.8\.2"):
        patch.install()


def test_a_newer_version_is_taken_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    patch.install()
    assert "verl 0.10.0: the patch was verified against 0.9.1" in caplog.text


def test_a_missing_function_is_named(monkeypatch):
    monkeypatch.delattr(core_algos, "agg_loss")
    with pytest.raises(UserError, match=r"core_algos\.agg_loss: expected it in verl 0\.9"):
        patch.install()


def test_a_changed_call_is_named(monkeypatch):
    def compute_policy_loss_vanilla(old_log_prob, log_prob, advantages, response_mask):
        pass

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", compute_policy_loss_vanilla)
    with pytest.raises(UserError, match=r"expected the parameters .* rollout_is_weights"):
        patch.install()


def test_says_once_that_another_average_is_not_its_own(rows, caplog):
    patch._warn_of_mode.cache_clear()
    for _ in range(2):
        run_verl(make_config(loss_agg_mode="token-mean"), rows, range(6))
    assert caplog.text.count("SAPO's own average is seq-mean-token-mean") == 1
