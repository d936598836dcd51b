"""An optimizer step whose learning rate goes by the effective number of sequences."""

import dataclasses
import math
import time

import pytest
import torch
import torch.distributed as dist

from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.loss import policy_loss, sequence_ess
from sapo_megatron.policy import parallel
from sapo_megatron.policy.step import SEQUENCE_ESS, Policy
from tests.support.exactness import LONGEST_RESPONSE, make_recipe
from tests.support.gloo import run_ranks
from tests.support.layouts import Layout
from tests.support.minibatches import MODELS, random_weights, samples

LAYOUT = Layout(world=4, pp=2)
"""Two ranks with sequences of their own, and two that see no log-prob."""


def opened(recipe, groups, folder, **optimizer):
    """A policy whose next update is its first, and the batches for it."""
    policy = Policy(
        recipe,
        parse_architecture(MODELS[LAYOUT.model]),
        groups,
        folder,
        optimizer=dataclasses.replace(recipe.optimizer, lr=1e-3, **optimizer),
        total_updates=1,
    )
    batches = [
        dataclasses.replace(batch, old_logprob=batch.rollout_logprob)
        for batch in micro_batches(samples(LAYOUT), groups.micro_batching(recipe))
    ]
    return policy, batches


def steps(folder):
    """By ess_scaling: how far each weight moved, learning rate in the metrics and after the step.

    And (uid, log-ratio) of the sequences that this rank's loss saw.
    """
    recipe = make_recipe(LAYOUT, folder, "float64")
    groups = parallel.setup(recipe.parallel, seed=1)
    seen, found = [], []

    def loss(batch, logprob, entropy):
        share, metrics = policy_loss(
            batch,
            logprob,
            entropy,
            algorithm=recipe.algorithm,
            denominators=denominators(samples(LAYOUT)),
            max_response_length=LONGEST_RESPONSE,
        )
        metrics.add(SEQUENCE_ESS, sequence_ess(batch, logprob))
        difference = (logprob - batch.rollout_logprob).detach()
        for i, uid in enumerate(batch.sample_uids):
            mine = batch.mask & (batch.sequence_ids == i)
            if mine.any():
                seen.append((uid, float(difference[mine].sum())))
        return share, metrics

    for scaled in (False, True):
        policy, batches = opened(recipe, groups, folder, ess_scaling=scaled)
        weights = [p for chunk in policy.model.chunks for p in chunk.parameters()]
        before = [p.detach().clone() for p in weights]
        metrics = policy.update(batches, loss, where="here")[0].gather(groups.world).values()
        moved = [p.detach() - b for p, b in zip(weights, before, strict=True)]
        left = {group["lr"] for group in policy.optimizer.param_groups}
        found.append((moved, metrics["actor/lr"], left))
        policy.close()
    parallel.teardown()
    return found, seen


def aside(folder):
    """Times on this rank, bytes of gradients meanwhile, and the weights of a step afterwards."""
    recipe = make_recipe(LAYOUT, folder, "float64")
    groups = parallel.setup(recipe.parallel, seed=1)
    found = []
    for left in (False, True):
        policy, batches = opened(recipe, groups, folder)
        if left:
            with policy.aside("gradients") as leave:
                if dist.get_rank() == 1:
                    time.sleep(0.3)  # the one that all wait for
                came = time.monotonic()
                leave()
                went = time.monotonic()
                sizes = [b.grad_data.untyped_storage().size() for b in policy.ddp[0].buffers]
                if dist.get_rank() == 1:
                    time.sleep(0.3)
                slept = time.monotonic()
            times = (came, went, slept, time.monotonic())
        policy.update(batches, lambda batch, logprob, _: (-logprob.sum(), Metrics()), where="here")
        found.append([p.detach() for chunk in policy.model.chunks for p in chunk.parameters()])
        policy.close()
    parallel.teardown()
    return times, sizes, all(map(torch.equal, *found))


def test_gradients_are_away_while_others_have_the_memory(tmp_path):
    """No rank's servers wake before all have left, none trains before all servers sleep."""
    random_weights(MODELS[LAYOUT.model], tmp_path / "weights")
    ranks = run_ranks(LAYOUT.world, aside, tmp_path / "weights")
    came, went, slept, back = zip(*(times for times, _, _ in ranks), strict=True)
    assert min(went) >= max(came)
    assert min(back) >= max(slept)
    for _, sizes, same in ranks:
        assert not any(sizes)
        assert same, "the step afterwards is another one"


def test_a_step_is_as_long_as_its_effective_number_of_sequences_allows(tmp_path):
    folder = tmp_path / "weights"
    random_weights(MODELS[LAYOUT.model], folder)
    ranks = run_ranks(LAYOUT.world, steps, folder)
    w = [math.exp(x) for x in {uid: x for _, seen in ranks for uid, x in seen}.values()]
    assert len(w) == sum(bool(s.response_tokens) for s in samples(LAYOUT))
    scale = math.sqrt(sum(w) ** 2 / sum(x * x for x in w) / len(w))
    assert 0.3 < scale < 0.9
    for ((moved, lr, left), (scaled_moved, scaled_lr, scaled_left)), _ in ranks:
        assert (lr, left) == (1e-3, {1e-3})
        assert scaled_lr == pytest.approx(1e-3 * scale, rel=1e-9)
        assert scaled_left == {1e-3}, "the schedule's again"
        assert any(m.any() for m in moved)
        for plain, scaled in zip(moved, scaled_moved, strict=True):
            torch.testing.assert_close(scaled, scale * plain, rtol=1e-6, atol=1e-12)
