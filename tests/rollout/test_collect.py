"""Groups: who belongs together, who is dropped and drawn again, what is counted."""

import contextlib
import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sapo_megatron.errors import RunFailed
from sapo_megatron.metrics import Metrics, Spans, Sum
from sapo_megatron.recipe.schema import RolloutConfig, RoutingConfig
from sapo_megatron.rollout.ahead import Ahead
from sapo_megatron.rollout.collect import Collector, describe, rewards
from sapo_megatron.rollout.engine import SamplingParams
from sapo_megatron.rollout.exchange import HeldRoutes, write_samples
from sapo_megatron.rollout.generate import InProcess
from sapo_megatron.rollout.reward import Scoring
from sapo_megatron.sample import Group, Prompt, Sample
from tests.support.gloo import run_ranks

EOS = 1


class Echo:
    """A model that says eos at once, unless it says one other token first."""

    device = torch.device("cpu")

    def generating(self, *, record):
        return contextlib.nullcontext()

    def start(self, batch_size, max_length):
        pass

    def logits(self, tokens):
        logits = torch.full((len(tokens), 4), -50.0)
        logits[:, 2] = logits[:, EOS] = 0.0
        logits[tokens[:, -1] == 2] = torch.tensor([-50.0, 50.0, -50.0, -50.0])
        return logits

    def agree(self, tokens, logprobs):
        return tokens, logprobs

    def any(self, flag):
        return flag

    def routes(self):
        return None


class Words:
    """A tokenizer."""

    def decode(self, ids):
        return " ".join(map(str, ids))


class Rule:
    """A scorer: ``reward(prompt uid, uid of the sample)``; None fails."""

    def __init__(self, reward):
        self.reward = reward
        self.texts = []
        self.broken = 0

    def begin(self, prompt, sample):
        self.texts.append(sample.text)
        reward = self.reward(prompt.uid, sample.uid)
        sample.reward = math.nan if reward is None else reward
        sample.problem = f"broken {sample.uid}" if reward is None else ""
        self.broken += reward is None
        return Scoring(prompt, sample, None)

    def finish(self, begun):
        metrics = Metrics()
        metrics.add("reward/errors", Sum(float(self.broken)))
        self.broken = 0
        return metrics


class Numbers:
    """A source of prompts 0, 1, 2, ..., and how many were asked for each time."""

    def __init__(self):
        self.drawn = []

    def next(self, n):
        first = sum(self.drawn)
        self.drawn.append(n)
        return [prompt(uid) for uid in range(first, first + n)]

    def state_dict(self):
        return {"index": sum(self.drawn)}


def prompt(uid):
    return Prompt(uid=uid, text=f"p{uid}", answer="", tokens=(3,) * (uid % 3 + 1))


def collector(reward, *, parts=1, stop_ids=(EOS,), engine=None):
    return Collector(
        engine=engine or InProcess(Echo(), batch_size=256),
        tokenizer=Words(),
        stop_ids=stop_ids,
        scorer=Rule(reward) if reward else None,
        part=dist.get_rank() % parts,
        parts=parts,
        world=dist.group.WORLD,
    )


def ahead(reward, source, *, steps=5, stop_ids=(EOS,), engine=None, **config):
    values = {"rollout_batch_size": 4, "num_generations": 3, "max_response_length": 5}
    recipe = SimpleNamespace(
        rollout=RolloutConfig(**(values | config)),
        routing=RoutingConfig(),
        train=SimpleNamespace(seed=3, steps=steps),
    )
    c = collector(reward, stop_ids=stop_ids, engine=engine)
    return Ahead(c, source, recipe)


PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=5, stop_ids=(EOS,), seed=3)


def test_groups_are_in_the_order_of_their_prompts(world):
    prompts = [prompt(uid) for uid in (7, 2, 5)]  # of unequal lengths: generated in another order
    c = collector(lambda prompt_uid, uid: uid / 100)
    groups = c.respond(prompts, 3, PARAMS, version=0).groups
    assert [g.prompt for g in groups] == prompts
    assert [[s.uid for s in g.samples] for g in groups] == [[21, 22, 23], [6, 7, 8], [15, 16, 17]]
    assert all(s.reward == s.uid / 100 for g in groups for s in g.samples)
    assert all(s.prompt_tokens == g.prompt.tokens for g in groups for s in g.samples)
    assert {tuple(s.response_tokens): s.text for g in groups for s in g.samples} == {
        (EOS,): "",
        (2, EOS): "2",
    }


def test_a_truncated_text_keeps_its_last_token(world):
    params = dataclasses.replace(PARAMS, max_new_tokens=1)
    groups = (
        collector(lambda prompt_uid, uid: 1.0).respond([prompt(1)], 9, params, version=0).groups
    )
    assert {(s.truncated, s.text) for s in groups[0].samples} == {(False, ""), (True, "2")}


def test_every_stop_token_ends_a_step_and_is_not_in_the_text(world):
    found = ahead(lambda prompt_uid, uid: 1.0, Numbers(), stop_ids=(EOS, 2)).collect()
    samples = [s for g in found.groups for s in g.samples]
    assert {(tuple(s.response_tokens), s.text) for s in samples} == {((EOS,), ""), ((2,), "")}
    assert found.metrics.values()["response/truncated"] == 0


def on_two_ranks():
    """Two parts of 15 responses; each leader scores what it generated."""
    c = collector(lambda prompt_uid, uid: uid / 100, parts=2)
    responses = c.respond([prompt(uid) for uid in range(5)], 3, PARAMS, version=0)
    return responses.groups, len(c._scorer.texts), responses.metrics.gather().values()


def two_ranks_of_one_model():
    """One share; rank 0 has no scorer, as on an early pipeline stage."""
    c = collector((lambda prompt_uid, uid: None) if dist.get_rank() else None)
    responses = c.respond([prompt(uid) for uid in range(5)], 3, PARAMS, version=0)
    scored = [s.scored for g in responses.groups for s in g.samples]
    return scored, responses.problem, responses.metrics.gather().values()


def test_two_ranks_share_the_work_and_both_get_all(tmp_path):
    (groups, first, _), (same, second, failures) = run_ranks(2, on_two_ranks)
    assert groups == same
    assert [[s.uid for s in g.samples] for g in groups] == [
        [3 * p, 3 * p + 1, 3 * p + 2] for p in range(5)
    ]
    assert (first, second) == (8, 7)  # the filler of the second is not scored
    assert failures["reward/errors"] == 0
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        c = collector(lambda prompt_uid, uid: uid / 100)
        assert c.respond([prompt(uid) for uid in range(5)], 3, PARAMS, version=0).groups == groups
    finally:
        dist.destroy_process_group()


def test_the_leader_alone_scores_and_its_failures_are_counted_once():
    for scored, problem, failures in run_ranks(2, two_ranks_of_one_model):
        assert scored == [False] * 15
        assert problem == "broken 0"
        assert failures["reward/errors"] == 15


def test_without_dynamic_sampling_every_group_stays(world):
    source = Numbers()
    collected = ahead(lambda prompt_uid, uid: 1.0, source).collect()
    groups, metrics = collected.groups, collected.metrics
    assert source.drawn == [4]
    assert len(groups) == 4
    values = metrics.values()
    assert values["reward/zero_std_groups"] == values["reward/groups"] == 4
    assert {"time/rollout", "time/reward"} <= set(values)


def test_dynamic_sampling_draws_again_what_it_dropped(world):
    source = Numbers()
    # Of every four prompts, only the last tells its responses apart.
    found = ahead(lambda p, uid: float(p % 4 == 3 and uid % 3 == 0), source, dynamic_sampling=True)
    collected = found.collect()
    groups, metrics = collected.groups, collected.metrics
    assert source.drawn == [4, 3, 3, 2, 1, 1, 1, 1]
    assert [g.prompt.uid for g in groups] == [3, 7, 11, 15]
    values = metrics.values()
    assert values["reward/groups"] == 16
    assert values["reward/zero_std_groups"] == 12
    assert values["reward/mean"] == pytest.approx(4 / 48)  # of all that was generated


def test_dynamic_sampling_ends_with_what_there_is(world):
    source = Numbers()
    found = ahead(
        lambda p, uid: float(p == 2 and uid % 3 == 0),
        source,
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=3,
    )
    groups = found.collect().groups
    assert source.drawn == [4, 3, 3]
    assert [g.prompt.uid for g in groups] == [2]


def test_dynamic_sampling_that_finds_nothing_fails(world):
    source = Numbers()
    limited = {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 2}
    with pytest.raises(RunFailed, match="no group with different rewards in 2 rounds"):
        ahead(lambda p, uid: 1.0, source, **limited).collect()
    assert source.drawn == [4, 4]


def left_out(reward, **config):
    """uid -> reward of what a step trains on, its metrics, and how many prompts it took."""
    source = Numbers()
    found = ahead(reward, source, **config)
    step = found.collect()
    assert found.queue().groups == ()
    uids = {s.uid: s.reward for g in step.groups for s in g.samples}
    return uids, step.metrics.values(), sum(source.drawn)


def test_what_could_not_be_scored_is_no_sample(world):
    """Of prompt 0 all are scored, of 1 two, of 2 one, of 3 none; a wrong answer is -1."""
    uids, values, drawn = left_out(lambda p, uid: None if uid % 3 < p else -1.0 + (uid == 5))
    assert uids == {0: -1.0, 1: -1.0, 2: -1.0, 4: -1.0, 5: 0.0, 8: -1.0}
    assert drawn == 4
    shown = ("errors", "mean", "groups", "zero_std_groups", "groups_left")
    assert [values[f"reward/{name}"] for name in shown] == [6, pytest.approx(-5 / 6), 4, 3, 3]
    assert values["response/length_mean"] <= 2


def test_dynamic_sampling_draws_again_what_could_not_be_scored(world):
    """A group that has no two different rewards left; one that has them trains without the rest."""
    reward = {0: (None, None, None), 1: (None, None, 1.0), 2: (None, 1.0, 1.0), 3: (None, 1.0, 0.0)}
    uids, values, drawn = left_out(lambda p, uid: reward[p % 4][uid % 3], dynamic_sampling=True)
    assert uids == {
        uid: 1.0 - (uid % 3 == 2) for p in (3, 7, 11, 15) for uid in (3 * p + 1, 3 * p + 2)
    }
    assert drawn == 16
    shown = ("errors", "groups", "zero_std_groups", "groups_left")
    assert [values[f"reward/{name}"] for name in shown] == [4 * 7, 16, 12, 4]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_run_ends_where_none_of_the_first_responses_is_scored(world, dynamic):
    source = Numbers()
    with pytest.raises(RunFailed, match=r"none of the first responses .* broken 0"):
        ahead(lambda p, uid: None, source, dynamic_sampling=dynamic).collect()
    assert source.drawn == [4]


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [(False, "none of the step's responses"), (True, "no group with different rewards in 8")],
)
def test_a_later_step_without_scores_ends_a_run_too(world, dynamic, message):
    found = ahead(lambda p, uid: float(uid) if p < 4 else None, Numbers(), dynamic_sampling=dynamic)
    found.collect()
    with pytest.raises(RunFailed, match=f"{message}.*broken"):
        found.collect()


def test_one_request_without_scores_is_no_reason_to_end(world):
    """The second, of two groups, is not scored; the third is."""
    uids, _, drawn = left_out(
        lambda p, uid: None if p in (4, 5) else float(p > 1) * uid, dynamic_sampling=True
    )
    assert (sorted({uid // 3 for uid in uids}), drawn) == ([2, 3, 6, 7], 8)


def test_routes_of_what_could_not_be_scored_are_let_go(world):
    found = ahead(lambda p, uid: None if uid % 3 == 0 else 1.0 * uid, Numbers())
    asked = found._collector.finish

    def with_routes(pending):
        result = asked(pending)
        held = {
            s.uid: HeldRoutes(rank=0, experts=(1, 1, 1), probs=None)
            for g in result.groups
            for s in g.samples
        }
        return dataclasses.replace(result, held=held)

    found._collector.finish = with_routes
    step = found.collect()
    assert set(step.held) == {s.uid for g in step.groups for s in g.samples}
    assert found._held == {}


def test_steps_ahead_are_generated_before_and_described_when_they_train(world):
    source = Numbers()
    # Of every four prompts, the first tells nothing apart; the rewards of later ones are higher.
    found = ahead(
        lambda p, uid: p / 100 + (p % 4 > 0) * (uid % 3),
        source,
        steps=3,
        async_steps=1,
        dynamic_sampling=True,
    )
    seen = []
    for _ in range(3):
        step = found.collect()
        values = step.metrics.values()
        uids = [g.prompt.uid for g in step.groups]
        seen.append(
            (uids, values["rollout/staleness_max"], values["reward/groups"], sum(source.drawn))
        )
        assert values["reward/errors"] == 0
    assert seen == [
        # Prompt 8 was dropped during the first step, and counts in the second.
        ([1, 2, 3, 5], 0, 6, 11),
        ([6, 7, 9, 10], 1, 5, 16),
        ([11, 13, 14, 15], 1, 5, 16),
    ]
    assert found.queue().groups == ()


def test_samples_are_scored_while_others_are_generated(world):
    """The scorer lets the engine go on: whoever scored at the end would wait for ever."""

    class Waiting(InProcess):
        def generate(self, requests, params, arrived, *, first=False):
            for request in requests:
                done = super().generate([request], params, arrived)
                assert begun.acquire(timeout=60)
            return done

    begun = threading.Semaphore(0)

    def reward(prompt_uid, uid):
        begun.release()
        return float(uid)

    c = collector(reward, engine=Waiting(Echo(), batch_size=1))
    (group,) = c.respond([prompt(1)], 3, PARAMS, version=0).groups
    assert [s.reward for s in group.samples] == [3.0, 4.0, 5.0]


class Slow(InProcess):
    """An engine in the background, each of whose answers has to be let through."""

    background = True

    def __init__(self):
        super().__init__(Echo(), batch_size=256)
        self.let = threading.Semaphore(0)
        self.threads = ThreadPoolExecutor(1)

    def generate(self, requests, params, arrived, *, first=False):
        def when_let():
            assert first or self.let.acquire(timeout=60)
            return InProcess.generate(self, requests, params, arrived).result()

        return ThreadPoolExecutor(1).submit(when_let) if first else self.threads.submit(when_let)


def test_what_it_takes_to_begin_counts_where_it_begins(world):
    """And not in the step that trains on it."""

    class Readied(Slow):
        @contextlib.contextmanager
        def serving(self, *, version, record):
            with super().serving(version=version, record=record) as metrics:
                yield metrics
            metrics.add("time/sync", Spans((("rank 0", 0.0, 1.0),)))

    engine = Readied()
    found = ahead(lambda p, uid: float(uid), Numbers(), steps=4, engine=engine, async_steps=1)
    engine.let.release(4)
    seconds = [found.collect().metrics.values().get("time/sync", 0.0) for _ in range(4)]
    assert seconds == [2.0, 1.0, 1.0, 0.0]


def test_what_is_under_way_comes_again_after_a_resume_and_evaluations_come_before_it(world):
    engine, source = Slow(), Numbers()
    found = ahead(lambda p, uid: float(uid), source, steps=3, engine=engine, async_steps=1)
    engine.let.release()
    assert [g.prompt.uid for g in found.collect().groups] == [0, 1, 2, 3]
    assert source.drawn == [4, 4]  # the second step's are under way
    assert found.queue().cursor == {"index": 4}
    assert found.queue().groups == ()
    (group,) = found._collector.respond([prompt(100)], 2, PARAMS, version=1).groups
    assert [s.uid for s in group.samples] == [200, 201]
    assert found.queue().cursor == {"index": 4}
    engine.let.release(2)
    assert [g.prompt.uid for g in found.collect().groups] == [4, 5, 6, 7]
    assert found.queue().cursor == {"index": 8}
    assert [g.prompt.uid for g in found.collect().groups] == [8, 9, 10, 11]
    assert source.drawn == [4, 4, 4]
    assert found.queue().cursor == {"index": 12}


def test_a_queue_that_two_ranks_wrote_goes_on_on_one(world, tmp_path):
    """Some groups in it are smaller than others; of prompt 7 nothing could be scored."""
    reward = {"async_steps": 2, "dynamic_sampling": True}

    def rule(p, uid):
        return None if p == 7 or (p % 4 == 1 and uid % 3 == 0) else (p % 4 > 0) * uid / 100

    first = ahead(rule, Numbers(), **reward)
    first.collect()
    queue = first.queue()
    samples = [s for here in queue.groups for s in here.group.samples]
    for rank, mine in enumerate((samples[::2], samples[1::2])):
        write_samples(tmp_path / f"ahead-{rank:05d}.safetensors", mine)
    source = Numbers()
    source.drawn.append(queue.cursor["index"])
    second = ahead(rule, source, **reward)
    assert 0 in [len(here.group.samples) for here in queue.groups]
    second.load(tmp_path, SimpleNamespace(step=1, ahead=queue.described()))
    for _ in range(4):
        expected, found = first.collect(), second.collect()
        assert found.groups == expected.groups
        values, others = expected.metrics.values(), found.metrics.values()
        assert {k: v for k, v in values.items() if not k.startswith("time/")} == {
            k: v for k, v in others.items() if not k.startswith("time/")
        }
    with pytest.raises(RunFailed):
        first.collect()  # all steps are through


def test_describe(caplog):
    def group(uid, *scored):
        samples = [
            Sample(
                uid=uid,
                prompt_tokens=(3,),
                response_tokens=[2] * length,
                rollout_logprobs=[0.0] * length,
                truncated=length == 5,
                reward=reward,
            )
            for reward, length in scored
        ]
        return Group(prompt=prompt(uid), samples=samples)

    groups = [group(0, (1.0, 5), (0.0, 1)), group(1, (0.5, 2), (0.5, 4))]
    values = describe(groups).values()
    assert values == {
        "reward/mean": 0.5,
        "reward/std": pytest.approx(0.125**0.5),
        "reward/zero_std_groups": 1,
        "reward/groups": 2,
        "response/length_mean": 3,
        "response/truncated": 0.25,
    }
    assert not caplog.records
    describe(groups[1:])
    assert "all 1 groups have equal rewards" in caplog.text


def test_rewards_keep_their_precision():
    samples = [
        Sample(
            uid=i,
            prompt_tokens=(3,),
            response_tokens=[EOS],
            rollout_logprobs=[0.0],
            truncated=False,
            reward=0.1 + i * 1e-12,
        )
        for i in range(2)
    ]
    scores = rewards(samples)
    assert scores.dtype == torch.float64
    assert scores[0] != scores[1]
