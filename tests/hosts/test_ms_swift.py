"""Recipes as flags of the real ms-swift, and the loss of its real Megatron trainer."""
# ruff: noqa: E402

import argparse
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed as dist

from tests.hosts import stubs

# Its trainer imports these and its loss does without them.
stubs.install("mcore_bridge", "megatron.core.extensions.transformer_engine")

import swift
from megatron.core import parallel_state
from swift.megatron.arguments import MegatronRLHFArguments
from swift.megatron.arguments.megatron_args import RLHFMegatronArgumentsMixin
from swift.megatron.trainers import base, grpo_trainer
from swift.ray.megatron.loss.grpo import GRPOLoss
from swift.rl_core.data import GRPOBatch
from transformers import HfArgumentParser

from sapo_megatron.errors import UserError
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.patches import ms_swift as patch
from sapo_megatron.recipe.load import load
from sapo_megatron.sample import Denominators, PackedBatch

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
RECIPE = ROOT / "recipes" / "qwen3-30b-a3b-8gpu.yaml"
REFUSED = {
    "tiny-moe-cpu": ("model.init", "cold_start.steps"),
    "tiny-moe-vllm-cpu": ("model.init", "cold_start.steps"),
}
MASKS = ("000111", "000001", "110111", "001111")
"""Of each response, padded on the left as ms-swift does."""
ADVANTAGES = (1.5, -2.0, 0.7, -0.4)
ROWS, TOKENS = 4, 13
PADDING = -1e10


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Megatron's process groups, of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def reductions(monkeypatch, tmp_path):
    """What is reduced how: gloo has no average, and one process has nothing to reduce."""
    seen = {}

    def _all_reduce_metric(self, metric, reduction=dist.ReduceOp.AVG, group=None):
        seen.update(dict.fromkeys(metric, reduction))
        return dict(metric)

    monkeypatch.setattr(base.BaseMegatronTrainer, "_all_reduce_metric", _all_reduce_metric)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.chdir(tmp_path)  # a trainer writes there
    return seen


@pytest.fixture
def patched():
    patch.install()
    yield
    patch.uninstall()


def parse(recipe):
    """ms-swift's own arguments, as far as they go without a model and without GPUs."""
    parser = HfArgumentParser(MegatronRLHFArguments)
    found, unknown = argparse.ArgumentParser.parse_known_args(parser, patch.flags(recipe))
    assert unknown == []
    arguments = object.__new__(MegatronRLHFArguments)
    vars(arguments).update(vars(found))
    # It checks the batches against the number of processes.
    world = (recipe.cluster.nodes or 1) * recipe.cluster.gpus_per_node
    with mock.patch.object(dist, "get_world_size", return_value=world):
        RLHFMegatronArgumentsMixin.__post_init__(arguments)
    return arguments


def make_recipe(*overrides):
    return load(RECIPE, dict(word.split("=") for word in overrides))


def make_trainer(recipe):
    """The trainer as ms-swift makes it itself where it needs nothing but the loss."""
    arguments = parse(recipe)
    arguments.num_microbatches = ROWS
    arguments.output_dir = "."
    return GRPOLoss._create_dummy_trainer(arguments)


@pytest.fixture
def rows():
    """[B, L] each, fp64; ``logprob`` is a leaf."""
    return make_rows()


def make_rows(spread=0.4):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[c == "1" for c in m] for m in MASKS])

    def noise(size):
        return size * torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    old = torch.where(mask, noise(0.5) - 2, PADDING)
    return {
        "mask": mask,
        "old": old,
        "ref": old + noise(0.2),
        "rollout": old + noise(0.3),
        "advantages": torch.tensor(ADVANTAGES).double()[:, None].expand(mask.shape),
        "logprob": torch.where(mask, old + noise(spread), PADDING).requires_grad_(),
    }


def run_swift(trainer, rows, chosen):
    """Its loss of a micro-batch, with what it reports."""
    piece = {name: x[chosen] for name, x in rows.items()}
    batch = GRPOBatch(
        completion_mask=piece["mask"],
        truncated_mask=torch.zeros(len(chosen), dtype=torch.bool),
        seq_lengths=piece["mask"].sum(1),
        old_per_token_logps=piece["old"],
        ref_per_token_logps=piece["ref"],
        rollout_per_token_logps=piece["rollout"],
        advantages=piece["advantages"],
        num_items_in_batch=torch.tensor(float(TOKENS)),
    )
    return trainer.loss_func(piece["logprob"], data={"grpo_batch": batch})


def whole(trainer, rows):
    """The mean over micro-batches of one response, as Megatron takes it."""
    return sum(run_swift(trainer, rows, [i])[0] for i in range(ROWS)) / ROWS


def run_ours(recipe, rows):
    zeros = torch.zeros(rows["mask"].numel(), dtype=torch.int64)
    length = rows["mask"].shape[1]
    batch = PackedBatch(
        tokens=zeros,
        targets=zeros,
        mask=rows["mask"].flatten(),
        position_ids=zeros,
        sequence_ids=torch.arange(ROWS).repeat_interleave(length),
        cu_seqlens=torch.arange(0, len(zeros) + 1, length, dtype=torch.int32),
        max_seqlen=length,
        lengths=rows["mask"].sum(1),
        advantages=rows["advantages"].flatten(),
        rollout_logprob=rows["rollout"].flatten(),
        sample_uids=tuple(range(ROWS)),
        old_logprob=rows["old"].flatten(),
        ref_logprob=rows["ref"].flatten(),
    )
    loss, _ = policy_loss(
        batch,
        rows["logprob"].flatten(),
        None,
        algorithm=recipe.algorithm,
        denominators=Denominators(sequences=ROWS, tokens=TOKENS),
        max_response_length=recipe.rollout.max_response_length,
        correction=recipe.correction,
    )
    return loss


def gradient(loss, rows):
    return torch.autograd.grad(loss, rows["logprob"])[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_as_flags(path):
    recipe = load(path)
    ahead = ("rollout.async_steps",) if recipe.rollout.async_steps else ()
    if refused := REFUSED.get(path.stem, ahead):
        with pytest.raises(UserError) as error:
            patch.flags(recipe)
        assert all(key in str(error.value) for key in refused)
        assert "\n" not in str(error.value)
        return
    arguments = parse(recipe)
    assert arguments.loss_type == "sapo"
    assert (arguments.tau_pos, arguments.tau_neg) == (1.0, 1.05)
    assert arguments.beta == 0
    assert arguments.steps_per_generation == recipe.train.num_mini_batches
    assert arguments.lr == recipe.optimizer.lr
    assert arguments.recompute_method == recipe.parallel.recompute_method
    assert arguments.context_parallel_size == recipe.parallel.context_parallel_size


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("model.tokenizer", ["model.tokenizer=elsewhere"]),
        ("model.params_dtype", ["model.params_dtype=float64"]),
        (
            "parallel.virtual_pipeline_model_parallel_size",
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
        ),
        (
            "rollout.async_steps",
            ["rollout.colocate=false", "rollout.async_steps=1"],
        ),
        (
            "routing.replay_threshold",
            ["routing.router_replay=R3", "routing.replay_threshold=0.5"],
        ),
        ("rollout.stop_token_ids", ["rollout.stop_token_ids=[3]"]),
        ("algorithm.loss_agg_mode", ["algorithm.loss_agg_mode=token-mean"]),
        ("algorithm.loss_type", ["algorithm.loss_type=vespo"]),
        ("algorithm.loss_agg_mode", ["algorithm.loss_type=cispo"]),
        (
            "algorithm.clip_ratio_low",
            [
                "algorithm.loss_type=cispo",
                "algorithm.loss_agg_mode=token-mean",
                "algorithm.clip_ratio_low=0.5",
            ],
        ),
        ("algorithm.old_policy", ["algorithm.old_policy=rollout"]),
        ("algorithm.kl_type", ["algorithm.kl_coef=0.1", "algorithm.kl_type=k2"]),
        ("algorithm.entropy_coef", ["algorithm.entropy_coef=0.1"]),
        ("correction.rollout_is", ["correction.rollout_is=icepop"]),
        ("correction.rollout_is", ["correction.rollout_is=tis", "algorithm.kl_coef=0.1"]),
        ("correction.sequence_mask_kl", ["correction.sequence_mask_kl=1"]),
        ("optimizer.ess_scaling", ["optimizer.ess_scaling=true"]),
    ],
)
def test_refuses_by_name_what_no_flag_says(key, overrides):
    with pytest.raises(UserError, match=rf"got {key} .*; change these"):
        patch.flags(make_recipe(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.tau_pos=0.5", "algorithm.tau_neg=3"],
        ["algorithm.kl_coef=0.1"],
        ["correction.rollout_is=tis", "correction.tis_cap=1.1"],
        ["algorithm.loss_type=grpo"],
        ["algorithm.loss_type=grpo", "algorithm.loss_agg_mode=token-mean"],
        ["algorithm.loss_type=grpo", "algorithm.loss_agg_mode=seq-mean-token-sum-norm"],
        ["algorithm.loss_type=grpo", "algorithm.clip_ratio_high=0.3", "algorithm.clip_ratio_c=1.5"],
        ["algorithm.loss_type=gspo"],
        ["algorithm.loss_type=gspo", "algorithm.loss_agg_mode=token-mean"],
        ["algorithm.loss_type=cispo", "algorithm.loss_agg_mode=token-mean"],
    ],
    ids=lambda overrides: " ".join(word.split(".")[1] for word in overrides) or "sapo",
)
def test_its_loss_with_our_flags_is_ours(overrides, rows):
    """By the flags that the recipe becomes; in value and gradient."""
    recipe = make_recipe(*overrides)
    theirs, ours = whole(make_trainer(recipe), rows), run_ours(recipe, rows)
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient(theirs, rows), gradient(ours, rows), rtol=1e-10, atol=1e-14)


def test_its_sequence_mask_stops_without_a_teacher(rows):
    """Which is why it is refused; should this fail, map correction.sequence_mask_kl."""
    trainer = make_trainer(make_recipe())
    trainer.off_policy_sequence_mask_delta = 0.05
    with pytest.raises(ValueError, match="teacher"):
        run_swift(trainer, rows, [0])


def test_advantages_by_our_flags_are_ours():
    from swift.rl_core.advantage import compute_advantages

    from sapo_megatron.objective.advantage import group_advantages

    rewards = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    for name in ("grpo", "dr_grpo", "rloo"):
        arguments = parse(make_recipe(f"algorithm.adv_estimator={name}"))
        theirs, _ = compute_advantages(
            rewards[:, None],
            torch.ones(1),
            4,
            arguments.advantage_estimator,
            arguments.scale_rewards,
            arguments.kl_in_reward,
        )
        ours = group_advantages(rewards.view(2, 4), name)
        # It adds 1e-4 to the standard deviation.
        torch.testing.assert_close(theirs, ours.flatten(), rtol=3e-4, atol=0)


OVERFLOW = 1000.0


def overflowing():
    """Ratios of exp(1000) and exp(-1000), and garbage where nothing counts; fp32."""
    rows = {
        name: x.detach() if x.dtype == torch.bool else x.detach().float()
        for name, x in make_rows().items()
    }
    logprob = rows["logprob"].clone()
    logprob[0, 4] += OVERFLOW
    logprob[1, 5] += OVERFLOW
    logprob[2, 4] -= OVERFLOW
    return {**rows, "logprob": logprob.requires_grad_()}


def test_overflow_gives_nan_without_the_patch():
    rows = overflowing()
    assert gradient(whole(make_trainer(make_recipe()), rows), rows).isnan().any()


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("garbage", [PADDING, math.nan, math.inf])
def test_overflow_is_ours_with_the_patch(garbage):
    rows = overflowing()
    logprob = torch.where(rows["mask"], rows["logprob"].detach(), garbage).requires_grad_()
    rows |= {"logprob": logprob, "old": torch.where(rows["mask"], rows["old"], -garbage)}
    recipe = make_recipe()
    theirs, ours = whole(make_trainer(recipe), rows), run_ours(recipe, rows)
    torch.testing.assert_close(theirs.double(), ours.double(), rtol=1e-5, atol=0)
    found = gradient(theirs, rows)
    torch.testing.assert_close(found, gradient(ours, rows), rtol=1e-4, atol=1e-7)
    assert (found[~rows["mask"]] == 0).all()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["correction.rollout_is=tis"],
        ["algorithm.kl_coef=1"],
    ],
    ids=["sapo", "tis", "kl"],
)
def test_not_a_bit_changes_where_nothing_overflows(overrides):
    rows = make_rows(spread=3.0)
    recipe = make_recipe(*overrides)
    before = whole(make_trainer(recipe), rows)
    patch.install()
    try:
        after = whole(make_trainer(recipe), rows)
    finally:
        patch.uninstall()
    assert torch.equal(before, after)
    assert torch.equal(gradient(before, rows), gradient(after, rows))


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_other_losses_get_what_they_always_got(loss_type, rows):
    trainer = make_trainer(make_recipe(f"algorithm.loss_type={loss_type}"))
    before, report = run_swift(trainer, rows, [0, 1, 2, 3])
    patch.install()
    try:
        after, report_after = run_swift(trainer, rows, [0, 1, 2, 3])
    finally:
        patch.uninstall()
    assert torch.equal(before, after)
    assert torch.equal(gradient(before, rows), gradient(after, rows))
    assert report.keys() == report_after.keys()


@pytest.mark.usefixtures("patched")
def test_its_log_has_our_metrics_exactly(rows, reductions):
    """Through its own aggregation: over micro-batches of different sizes, then over updates."""
    trainer = make_trainer(make_recipe())
    trainer.config = argparse.Namespace(num_moe_experts=None)
    trainer.args.num_microbatches = 2
    totals = {}
    for micro_batches in ([[0, 1, 2], [3]], [[1], [0, 2, 3]]):
        reports = [run_swift(trainer, rows, chosen)[1] for chosen in micro_batches]
        trainer._aggregated_metrics(reports, totals)
    trainer._log_callback(totals, totals.pop("n_steps"))

    mask = rows["mask"]
    log_ratio = (rows["logprob"] - rows["old"]).detach()
    positive, negative = mask & (rows["advantages"] > 0), mask & (rows["advantages"] < 0)
    gates = [torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau for tau in (1.0, 1.05)]
    expected = {
        "ratio/log_mean": log_ratio[mask].mean(),
        "ratio/log_var": log_ratio[mask].var(correction=0),
        "ratio/mean": log_ratio[mask].exp().mean(),
        "sapo/gate_pos_mean": gates[0][positive].mean(),
        "sapo/gate_neg_mean": gates[1][negative].mean(),
        "sapo/seq_var": sum(x[m].var(correction=0) for x, m in zip(log_ratio, mask, strict=True))
        / ROWS,
        "sapo/bound_violations": 0.0,
    }
    for name, value in expected.items():
        assert totals[name] == pytest.approx(float(value), rel=1e-5), name
    assert 0 < totals["sapo/bound_lhs"] <= totals["sapo/bound_rhs"]
    assert {"sapo/gate_mean", "sapo/weight_mean", "sapo/gate_distance", "loss"} <= totals.keys()
    ours = {name for name in reductions if name.startswith(("ratio/", "sapo/"))}
    assert {reductions[name] for name in ours} == {dist.ReduceOp.SUM}


@pytest.mark.usefixtures("patched")
def test_violations_are_a_number_per_update(rows, monkeypatch):
    measure_rows = patch.measure_rows

    def violated(*args, **options):
        return measure_rows(*args, **options)._replace(violations=torch.tensor(3.0).double())

    monkeypatch.setattr(patch, "measure_rows", violated)
    trainer = make_trainer(make_recipe())
    trainer.config = argparse.Namespace(num_moe_experts=None)
    totals = {}
    for _ in range(2):
        trainer._aggregated_metrics([run_swift(trainer, rows, [i])[1] for i in range(ROWS)], totals)
    trainer._log_callback(totals, totals.pop("n_steps"))
    assert totals["sapo/bound_violations"] == pytest.approx(3 * ROWS)


def test_twice_is_as_once_and_uninstall_puts_it_back():
    methods = [
        (grpo_trainer.MegatronGRPOTrainer, "loss_func"),
        (base.BaseMegatronTrainer, "_log_callback"),
    ]
    before = [getattr(*method) for method in methods]
    patch.install()
    patch.install()
    assert [getattr(*method).__wrapped__ for method in methods] == before
    patch.uninstall()
    assert [getattr(*method) for method in methods] == before
    patch.uninstall()


def test_from_a_plugin_as_swift_loads_it(tmp_path):
    from swift.utils import import_external_file

    plugin = tmp_path / "plugin.py"
    plugin.write_text("from sapo_megatron.patches import ms_swift\n\nms_swift.install()\n")
    before = grpo_trainer.MegatronGRPOTrainer.loss_func
    import_external_file(str(plugin))
    assert grpo_trainer.MegatronGRPOTrainer.loss_func is not before
    patch.uninstall()


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr(swift, "__version__", "4.5.0")
    with pytest.raises(UserError, match=r"ms-swift: expected 4\.6\.0 or later, got 4\.5\.0"):
        patch.install()


def test_a_missing_method_is_named(monkeypatch):
    monkeypatch.delattr(base.BaseMegatronTrainer, "_aggregated_metrics")
    with pytest.raises(UserError, match=r"_aggregated_metrics: expected it in ms-swift 4\.6\.0"):
        patch.install()


def test_a_changed_signature_is_named(monkeypatch):
    def loss_func(self, output_tensor, batch, data):
        pass

    monkeypatch.setattr(grpo_trainer.MegatronGRPOTrainer, "loss_func", loss_func)
    with pytest.raises(
        UserError, match=r"loss_func: expected the parameters .*output_tensor, data"
    ):
        patch.install()
    assert grpo_trainer.MegatronGRPOTrainer.loss_func is loss_func
