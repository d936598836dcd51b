"""Runs whose servers go on with half a response under new weights, token by token."""

import pytest
import torch

from sapo_megatron.rollout.ahead import Ahead
from sapo_megatron.training import loop
from tests.support.gloo import run_ranks
from tests.support.tiny import read_metrics, write_recipe
from tests.support.whole_runs import run
from tests.vllm.conftest import ARCH

STEPS = 6


def trained(folder):
    """A run, and by sample: versions, log-probs of its servers, and the trainer's of each version.

    The trainer's are computed at the end, with the weights that it had at the start of each step.
    """
    weights, samples, found = [], [], {}
    step, steps, collect = loop.run_step, loop.run_steps, Ahead.collect

    def parameters(session):
        return [p for chunk in session.policy.model.chunks for p in chunk.parameters()]

    def kept(session, number):
        weights.append([p.detach().clone() for p in parameters(session)])
        return step(session, number)

    def collected(self):
        responses = collect(self)
        samples.extend(s for group in responses.groups for s in group.samples)
        return responses

    def compared(session):
        summary = steps(session)
        cut = session.groups.micro_batching(session.recipe)
        in_order = sorted(samples, key=lambda s: s.uid)
        for version, values in enumerate(weights):
            with torch.no_grad():
                for parameter, value in zip(parameters(session), values, strict=True):
                    parameter.copy_(value)
            rows = iter(session.policy.logprobs(in_order, cut))
            for s in in_order:
                entry = found.setdefault(s.uid, (s.versions, s.rollout_logprobs, {}))
                entry[2][version] = [next(rows) for _ in s.response_tokens]
        return summary

    loop.run_step, loop.run_steps, Ahead.collect = kept, compared, collected
    run(folder)
    return list(found.values())


@pytest.fixture(scope="module", params=[1, 4])
def done(request, servers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("async")
    rollout = {"engine": "vllm", "servers": list(servers.urls), "server_timeout_s": 300.0}
    rollout |= {"async_steps": request.param, "on_new_weights": "continue"}
    # Four at a time they take much longer than an update: some are always under way.
    rollout |= {"server_concurrency": 4, "num_generations": 8, "max_response_length": 96}
    write_recipe(
        folder,
        arch=ARCH,
        rollout=rollout,
        train={"steps": STEPS, "run_dir": str(folder / "run")},
        eval={"every": 3},
        checkpoint={"every": 0},
        routing={"observe": False},
    )
    (samples,) = run_ranks(1, trained, folder)
    return request.param, samples, read_metrics(folder / "run")


def test_every_token_has_the_log_prob_of_the_weights_that_its_version_says(done):
    _, samples, _ = done
    others = []
    for versions, logprobs, exact in samples:
        for place, (version, logprob) in enumerate(zip(versions, logprobs, strict=True)):
            assert abs(logprob - exact[version][place]) < 1e-4
            others += [abs(logprob - exact[v][place]) for v in exact if v != version]
    assert max(others) > 1e-2, "weights that are told apart"


def test_responses_go_on_over_new_weights_and_nothing_is_older_than_it_may_be(done):
    ahead, samples, steps = done
    assert all(versions == sorted(versions) for versions, _, _ in samples)
    assert any(len(set(versions)) > 1 for versions, _, _ in samples)
    assert sum(line["rollout/continued"] for line in steps) == sum(
        len(set(versions)) > 1 for versions, _, _ in samples
    )
    for line in steps:
        assert line["rollout/staleness_max"] <= ahead
        shares = [line[f"rollout/staleness/{age}"] for age in range(ahead + 1)]
        assert sum(shares) == pytest.approx(1)
        mean = sum(age * share for age, share in enumerate(shares))
        assert line["rollout/staleness_mean"] == pytest.approx(mean)
    assert steps[0]["rollout/staleness_max"] == 0
