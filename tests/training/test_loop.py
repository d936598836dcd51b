"""The whole pipeline through its front door, and each kind of loss for a step."""

import json
import math
from collections import defaultdict
from itertools import pairwise

import pytest

from sapo_megatron.recipe.load import load
from sapo_megatron.runs.dump import read_dumps
from sapo_megatron.runs.timeline import read_timeline
from tests.docs import metrics_page
from tests.support.gloo import run_ranks
from tests.support.tiny import ROOT, cli, read_metrics, write_recipe
from tests.support.whole_runs import REPLAYS, VARIANTS, command, variants

METRICS = {
    "actor/pg_loss",
    "actor/grad_norm",
    "actor/entropy",
    "actor/ppo_kl",
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "ratio/log_var",
    "ratio/ess",
    "sapo/gate_mean",
    "sapo/gate_pos_mean",
    "sapo/gate_neg_mean",
    "sapo/weight_mean",
    "reward/mean",
    "reward/std",
    "reward/zero_std_groups",
    "reward/errors",
    "reward/timeouts",
    "response/length_mean",
    "response/truncated",
    "routing/slot_flip",
    "routing/slot_flip/layer_2",
    "routing/router_flip",
    "routing/token_flip_share",
    "routing/layers_flipped",
    "routing/tv",
    "routing/shift_factor",
    "routing/max_violation",
    "rollout_train/slot_flip",
    "rollout_train/tv",
    "rollout_train/kl",
    "rollout_train/k3_kl",
    "rollout_train/logprob_abs_diff",
    "rollout_train/extreme_fraction",
    "variance/total",
    "variance/weights",
    "variance/router",
    "variance/cov",
    "variance/router_share",
    "variance/router_share_own",
    "variance/router_share_inherited",
    "variance/replay_removes",
    "variance/swaps",
    "variance/noise",
    "sapo/bound_lhs",
    "sapo/bound_rhs",
    "sapo/bound_violations",
    "sapo/gate_distance",
    "perf/tokens_per_s",
    "perf/tokens_per_s_per_gpu",
    "perf/tflops_per_gpu",
    "perf/step_s",
    "perf/rollout_idle",
    "perf/train_idle",
    "time/rollout",
    "time/rollout_wait",
    "time/reward",
    "time/exchange",
    "time/logprob",
    "time/update",
}
RECIPE = ROOT / "recipes" / "tiny-moe-cpu.yaml"
BUDGET = [
    "train.steps=3",
    "cold_start.steps=20",
    "cold_start.batch_size=16",
    "rollout.rollout_batch_size=8",
    "eval.num_problems=8",
    "eval.every=2",
    "--k=4",
    "logging.dump_every=4",
    "checkpoint.every=2",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def done(work):
    """The shipped recipe with a small budget and a reward that untrained models get, too."""
    words = ["train", RECIPE, "--loss_type", "sapo", "--tau_pos", "1.0"]
    words += ["--tau_neg", "1.05", *BUDGET, "reward.function=tests.support.tiny:even"]
    return cli(*words, cwd=work)


@pytest.fixture(scope="module")
def run(work, done):
    assert done.returncode == 0, done.stderr
    return work / "runs" / "tiny-moe-cpu" / "run-001"


def test_it_ends_well_and_says_where_things_are(done, run):
    assert done.left == []
    assert "Traceback" not in done.stderr
    shown = ("before: avg@4", "after:  avg@4", "step 3/3", "run-001/report/index.html")
    for text in (*shown, "router: router share unknown (", " of 400 swaps)"):
        assert text in done.stderr
    assert done.stderr.count("step 1/3") == 1  # of two ranks, one speaks


def test_the_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["loss_type"] == "sapo"
    assert summary["world_size"] == 2
    assert summary["wall_s"] > 0
    for when in ("before", "after"):
        assert set(summary["eval"][when]) == {"avg@4", "pass@1"}
        assert all(0 <= score <= 1 for score in summary["eval"][when].values())
    assert (run.parents[2] / summary["report"]).exists()
    assert set(summary["router"]) == {
        "variance/total",
        "variance/swaps",
        "routing/slot_flip",
    }


def test_the_metrics_of_every_step(run):
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(line) >= METRICS
        assert [name for name in line if name != "step" and not metrics_page.has(name)] == []
        finite = METRICS - {"sapo/gate_pos_mean", "sapo/gate_neg_mean"}
        assert all(math.isfinite(line[name]) for name in finite)
        assert line["actor/grad_norm"] > 0
        assert sum(line["ratio/hist_pos"]["hist"]["counts"]) > 0
    assert [("eval/avg@4" in line) for line in lines] == [False, True, True]
    assert [("time/checkpoint" in line) for line in lines] == [False, False, True]
    summary = json.loads((run / "summary.json").read_text())
    assert lines[-1]["eval/avg@4"] == summary["eval"]["after"]["avg@4"]


def test_the_timeline_agrees_with_the_times(run):
    events = read_timeline(run / "timeline.json")
    assert {event.where for event in events} == {"rank 0", "rank 1"}
    for line in read_metrics(run):
        seconds = defaultdict(float)
        for event in events:
            if event.step == line["step"]:
                seconds[event.stage, event.where] += event.seconds
        for name in (name for name in line if name.startswith("time/")):
            stage = name.removeprefix("time/")
            most = max(seconds[stage, where] for where in ("rank 0", "rank 1"))
            assert most == pytest.approx(line[name], abs=1e-5), name
        for rank in ("rank 0", "rank 1"):  # which does one thing at a time
            spans = [e for e in events if (e.step, e.where) == (line["step"], rank)]
            own = sorted((e.begin, e.begin + e.seconds) for e in spans if e.stage != "step")
            assert all(a[1] <= b[0] + 2e-6 for a, b in pairwise(own))
        assert seconds["step", "rank 0"] == pytest.approx(line["perf/step_s"], rel=0.1)
        # The ranks generate or train, and do little else.
        assert 0 < line["perf/rollout_idle"] < 1
        assert 0 < line["perf/train_idle"] < 1
        assert line["perf/rollout_idle"] + line["perf/train_idle"] > 1


def test_the_first_of_several_mini_batches_is_on_policy_and_the_last_is_not(run):
    line = read_metrics(run)[0]
    assert line["ratio/max"] > 1 > line["ratio/min"]
    counts = line["ratio/hist_pos"]["hist"]["counts"]
    assert counts[20] + counts[19] >= sum(counts) / 4  # r = 1 lies between these bins


def test_the_rest_of_the_folder(run):
    assert (run / "report" / "index.html").stat().st_size > 100_000
    assert (run / "checkpoints" / "step-000003" / "state.json").exists()
    kept = load(run / "config.yaml")
    assert kept.train.steps == 3
    assert kept.parallel.expert_model_parallel_size == 2
    assert [p.name for p in run.parent.glob("cold-start-*")] != []
    assert not list(run.parent.rglob("*.tmp"))


def test_dumps_hold_the_last_mini_batch_of_each_step(run):
    files = sorted((run / "dumps").iterdir())
    assert len(files) == 3 * 2, "both ranks hold sequences of their own"
    dump = read_dumps([p for p in files if p.name.startswith("step-000003")])
    rows = dump.rows
    log_ratio = (rows.logprob.double() - rows.old_logprob.double())[rows.mask]
    line = read_metrics(run)[-1]
    assert float(log_ratio.var(correction=0)) == pytest.approx(line["variance/total"], rel=1e-4)
    assert rows.layers_changed.min() >= 0
    assert len(dump.lengths) == 8 * 8 / 4


def test_the_rollout_engine_is_the_training_engine(run):
    for line in read_metrics(run):
        assert line["rollout_train/extreme_fraction"] == 0
        assert line["rollout_train/logprob_abs_diff"] < 1e-5
        assert line["sapo/bound_violations"] == 0


def test_eval_finds_the_scores_of_the_checkpoint(work, run):
    before = sorted(work.rglob("*"))
    words = ["eval", run / "config.yaml", "--checkpoint", run, "--out", work / "scores.json"]
    (status, shown), (other, nothing) = run_ranks(2, command, work, [*map(str, words)])
    assert (status, other, nothing) == (0, 0, "")
    expected = json.loads((run / "summary.json").read_text())["eval"]["after"]
    assert json.loads((work / "scores.json").read_text()) == expected
    assert shown == "".join(f"{name} {score:.4f}\n" for name, score in expected.items())
    assert sorted(work.rglob("*")) == sorted([*before, work / "scores.json"])


# One rank


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """(folder, what was found)."""
    folder = tmp_path_factory.mktemp("variants")
    return folder, run_ranks(1, variants, folder)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_loss_runs(one_rank, name):
    folder, found = one_rank
    (line,) = read_metrics(folder / name)
    assert found[name]["loss_type"] == name
    assert math.isfinite(line["actor/pg_loss"])
    assert line["actor/grad_norm"] > 0
    assert ("actor/clip_fraction" in line) == (name not in ("sapo", "vespo"))
    assert ("vespo/phi_mean" in line) == (name == "vespo")
    if name != "sapo":
        assert line["actor/kl_loss"] != 0  # the second mini-batch has left the reference
    assert ("actor/dual_clip_fraction" in line) == (name == "grpo")


def test_losses_differ(one_rank):
    folder, _ = one_rank
    assert len({read_metrics(folder / name)[0]["actor/grad_norm"] for name in VARIANTS}) == len(
        VARIANTS
    )


@pytest.mark.parametrize("mode", REPLAYS)
def test_a_run_that_observes_nothing_trains_the_same(one_rank, mode):
    folder, _ = one_rank
    (seen,), (unseen,) = (read_metrics(folder / f"{mode} {observe}") for observe in (True, False))
    observed = ("routing/", "variance/", "sapo/bound", "rollout_train/variance/")
    observed += ("rollout_train/slot_flip", "rollout_train/tv")
    assert not [name for name in unseen if name.startswith(observed)]
    assert all(any(name.startswith(prefix) for name in seen) for prefix in observed)
    trained = [name for name in unseen if name.startswith(("actor/", "ratio/", "reward/"))]
    assert len(trained) > 10
    for name in ("rollout_train/replay_replaced", "routing/replay_replaced"):
        assert (0 <= seen[name] < 0.2) if mode == "graded" else name not in seen
    assert {name: unseen[name] for name in trained} == {name: seen[name] for name in trained}


def test_dynamic_sampling(one_rank):
    folder, found = one_rank
    (line,) = read_metrics(folder / "dynamic")
    assert line["reward/groups"] > 4
    assert line["reward/groups"] - line["reward/zero_std_groups"] <= 4
    assert "no group with different rewards in 8 rounds" in found["nothing to learn"]


def test_rewards_that_fail_do_not_end_a_run(one_rank):
    folder, _ = one_rank
    (line,) = read_metrics(folder / "errors")
    assert 0 < line["reward/errors"] < 16
    assert line["reward/timeouts"] == 0


def test_a_function_that_always_fails_ends_a_run_with_its_error(one_rank):
    _, found = one_rank
    assert "responses could not be scored" in found["broken"]
    assert "RuntimeError: the judge is down" in found["broken"]


def test_a_mini_batch_without_a_token_makes_no_update(one_rank):
    folder, found = one_rank
    (line,) = read_metrics(folder / "few")
    assert (line["reward/groups"], line["reward/groups_left"]) == (8, 2)
    assert len(found["few updates"]) == 4
    assert all(found["few updates"])
    assert line["actor/skipped_updates"] == 0


def test_stop_tokens_of_the_recipe_end_responses(one_rank):
    folder, _ = one_rank
    (line,) = read_metrics(folder / "short")
    assert (line["response/length_mean"], line["response/truncated"]) == (1, 0)


def test_no_steps_are_an_evaluation(one_rank):
    folder, found = one_rank
    scores = found["only evaluation"]["eval"]
    assert scores["before"] == scores["after"]
    assert (folder / "none" / "summary.json").exists()


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("mode", ["abort", "skip"])
def test_numbers_that_are_not_finite_change_no_weights(one_rank, mode, poison):
    folder, found = one_rank
    message, changed = found[f"{mode} {poison}"]
    assert not changed
    if mode == "abort":
        metric = {"loss": "actor/pg_loss", "gradient": "actor/grad_norm"}[poison]
        for text in ("step 1, mini-batch 2 of 4", metric, "not finite"):
            assert text in message
        return
    (line,) = read_metrics(folder / f"skip-{poison}")
    assert line["actor/skipped_updates"] == 0.25
    assert math.isfinite(line["actor/pg_loss"])
    assert math.isfinite(line["actor/grad_norm"])


def test_a_run_that_diverges_ends_with_one_line_and_status_one(tmp_path):
    write_recipe(tmp_path)
    done = cli("train", "recipe.yaml", "optimizer.lr=1e9", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "step 1, mini-batch 2 of 2" in errors[0]
    assert "Traceback" not in done.stderr


def test_weights_that_are_not_finite_are_found_in_the_first_update(tmp_path):
    """Through generation and evaluation, as far as the check of the update."""
    write_recipe(tmp_path)
    done = cli("train", "recipe.yaml", cwd=tmp_path, program=("-c", POISONED))
    assert done.returncode == 1, done.stderr
    assert "step 1, mini-batch 1 of 2: actor/pg_loss is not finite" in done.stderr
    assert "Traceback" not in done.stderr


POISONED = """
import sys, torch
from sapo_megatron.__main__ import main
from sapo_megatron.policy import weights
load = weights.HuggingFaceWeights.load
def poisoned(self):
    load(self)
    with torch.no_grad():
        self._chunks[0].output_layer.weight[5, 3] = float("nan")
weights.HuggingFaceWeights.load = poisoned
sys.exit(main(sys.argv[1:]))
"""
