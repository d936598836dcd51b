"""Interrupted runs: what is left of them, and that they go on as if nothing had happened."""

import json

import pytest

from tests.support.gloo import run_ranks
from tests.support.tiny import WITHOUT_REPORT, cli, read_metrics, write_recipe
from tests.support.whole_runs import resuming


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what each rank found)."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(2, resuming, folder)


def lines(run):
    """What training computed, which a clock does not change."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}
        for line in read_metrics(run)
    ]


def test_a_run_that_is_asked_to_stop(runs):
    _, (found, other) = runs
    assert found["stopped"]["first"] is None
    assert other["stopped"]["first"] is None
    assert found["stopped"]["left"] == ["checkpoints/step-000002"]


@pytest.mark.parametrize("name", ["halves", "crashed", "stopped", "full"])
def test_an_interrupted_run_computes_what_a_whole_one_does(runs, name):
    folder, (found, _) = runs
    straight = lines(folder / "straight")
    assert [line["step"] for line in straight] == [1, 2, 3, 4]
    assert len({line["actor/pg_loss"] for line in straight}) == 4
    for line in straight:  # of two updates, of which the first is with the weights that sampled
        assert 0.005 < line["actor/lr"] < 0.01
        assert 0 < line["ratio/sequence_ess"] < 1
    interrupted = lines(folder / name)
    if name == "halves":  # it thought that step 2 was its last, and evaluated
        for score in ("eval/avg@2", "eval/pass@1"):
            interrupted[1].pop(score)
    assert interrupted == straight
    samples = [folder / run / "samples.jsonl" for run in (name, "straight")]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    assert found[name]["eval"] == found["straight"]["eval"]
    written = json.loads((folder / name / "summary.json").read_text())
    assert written["eval"] == found["straight"]["eval"]
    assert written["steps"] == 4


def test_a_crash_while_writing_leaves_the_checkpoint_before(runs):
    _, (found, _) = runs
    assert found["left behind"] == [".step-000003.tmp", "step-000001", "step-000002"]
    assert found["kept"] == ["step-000003", "step-000004"]


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(runs):
    folder, (found, other) = runs
    full = found["full"]
    assert "(no space is left on the disk)" in other["full"]["said"]
    for said, reason in (("said", "no space is left"), ("state", "No space left on device")):
        assert full[said].startswith(f"{folder / 'full' / 'checkpoints'}: a checkpoint could not ")
        assert reason in full[said]
        assert "\n" not in full[said]
        assert full[said].endswith("and go on with --resume auto")
    assert full["left"] == full["left then"] == ["step-000001"]


def test_the_prompts_of_a_lost_step_come_again(runs):
    """A step that ends the run, here for want of anything to learn, has drawn some already."""
    _, (found, other) = runs
    lost, ended = found["lost"]
    assert lost == ended == other["lost"][0]
    assert lost["index"] > 0


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ("layout", ["parallel.expert_model_parallel_size", "expected 2", "got 1"]),
        ("fewer steps", ["train.steps", "at least 4", "got 3"]),
        ("model", ["model.path", "hidden_size is 64 instead of 32"]),
        ("no run", ["--resume", "wide"]),
        ("taken", ["train.run_dir", "--resume auto"]),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(runs, mistake, expected):
    for found in runs[1]:
        for text in expected:
            assert text in found[mistake]


def test_a_refused_run_leaves_everything_as_it_was(runs):
    assert all(found["untouched"] for found in runs[1])


def test_a_finished_run_only_tells_its_scores_again(runs):
    folder, (found, _) = runs
    assert found["finished"]["eval"] == found["straight"]["eval"]
    assert [line["step"] for line in read_metrics(folder / "straight")] == [1, 2, 3, 4]


def test_a_run_that_generates_ahead_goes_on_with_the_very_same_responses(runs):
    folder, (found, _) = runs
    straight, stopped = folder / "ahead", folder / "ahead stopped"
    assert found["ahead"]["stopped"]["left"] == ["checkpoints/step-000002"]
    assert lines(stopped) == lines(straight)
    samples = [(run / "samples.jsonl").read_text() for run in (straight, stopped)]
    assert samples[0] == samples[1]
    oldest = {}
    for group in map(json.loads, samples[0].splitlines()):
        ages = [response["staleness_max"] for response in group["responses"]]
        oldest[group["step"]] = max(*ages, oldest.get(group["step"], 0))
    assert oldest == {1: 0, 2: 1, 3: 2, 4: 2}
    assert [line["rollout/staleness_max"] for line in lines(straight)] == [0, 1, 2, 2]
    assert sum(line["reward/zero_std_groups"] for line in lines(straight)) > 0
    assert found["ahead"]["same"]
    assert not found["ahead"]["unmoved"]


def test_the_last_steps_generate_nothing(runs):
    folder, (found, _) = runs
    spent = [line["time/rollout"] > 0 for line in read_metrics(folder / "ahead")]
    assert spent == [True, True, False, False]
    assert found["ahead"]["files"] == [["ahead-00000.safetensors", "ahead-00001.safetensors"], []]


def test_responses_ahead_that_do_not_fit_are_refused_on_every_rank(runs):
    for found in runs[1]:
        refused = found["ahead"]
        assert "rollout.num_generations: expected 4, with which " in refused["other"]
        assert "(ahead-00001.safetensors is missing)" in refused["missing"]
        assert "got a damaged one (ahead-0000" in refused["torn"]
        assert all(refused[name].count("\n") == 0 for name in ("other", "missing", "torn"))


KILLED = """
import functools, os, signal, sys, time
import sapo_megatron.policy
from megatron.core.dist_checkpointing.strategies import filesystem_async
rank, write = os.getpid(), filesystem_async._write_item
@functools.wraps(write)
def killed(*args, **kwargs):
    if "step-000002" in next(arg.name for arg in args if hasattr(arg, "fileno")):
        time.sleep(0.5)  # by now the rank waits for those that write
        os.kill(rank, signal.SIGKILL)
    return write(*args, **kwargs)
filesystem_async._write_item = killed
from sapo_megatron.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_is_killed_while_it_writes_goes_on_from_its_last_checkpoint(tmp_path):
    write_recipe(tmp_path, checkpoint={"every": 1}, train={"steps": 3})
    killed = cli("train", "recipe.yaml", cwd=tmp_path, program=("-c", KILLED))
    assert killed.returncode == -9
    assert killed.left == []
    run = tmp_path / "runs" / "recipe" / "run-001"
    assert not (run / "summary.json").exists()
    assert [line["step"] for line in read_metrics(run)] == [1, 2]  # of which the second comes again
    words = ["train", "recipe.yaml", "--resume", "auto"]
    resumed = cli(*words, cwd=tmp_path, program=WITHOUT_REPORT)
    assert resumed.returncode == 0, resumed.stderr
    assert "run-001/checkpoints/step-000001" in resumed.stderr
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert [p.name for p in run.parent.glob("run-*")] == ["run-001"]


def test_a_finished_run_that_is_resumed_keeps_its_summary(tmp_path):
    often = {"decompose_every": 1}
    write_recipe(tmp_path, checkpoint={"every": 1}, train={"steps": 1}, routing=often)
    summaries = []
    for _ in range(2):
        words = ["train", "recipe.yaml", "--resume", "auto"]
        done = cli(*words, cwd=tmp_path, program=WITHOUT_REPORT)
        assert done.returncode == 0, done.stderr
        run = tmp_path / "runs" / "recipe" / "run-001"
        summaries.append(json.loads((run / "summary.json").read_text()))
    first, again = summaries
    assert "variance/total" in first["router"]
    assert again["router"] == first["router"]
    assert again["eval"]["before"] == first["eval"]["before"]
