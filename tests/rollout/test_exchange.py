"""Samples on every rank, routes on those that train on them, in hardly more memory than that."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.rollout.exchange import (
    deliver_routes,
    exchange_samples,
    read_samples,
    write_samples,
)
from sapo_megatron.sample import Sample, SampleRoutes
from tests.support.gloo import run_ranks

WORLD = 4
LAYERS, TOPK, EXPERTS, EVERY = 3, 2, 5, 4


def sample(uid, prompt=3, response=6, *, probs=True):
    rng = np.random.default_rng(uid)
    fed = prompt + response - 1
    positions = np.arange(0, fed, EVERY)
    routes = SampleRoutes(
        experts=rng.integers(0, EXPERTS, (fed, LAYERS, TOPK), dtype=np.int16),
        probs=rng.random((len(positions), LAYERS, EXPERTS), dtype=np.float32) if probs else None,
        positions=positions if probs else None,
    )
    return Sample(
        uid=uid,
        prompt_tokens=tuple(rng.integers(0, 200_000, prompt).tolist()),
        response_tokens=rng.integers(0, 200_000, response).tolist(),
        rollout_logprobs=(-rng.random(response)).tolist(),
        versions=rng.integers(0, 9, response).tolist(),
        truncated=bool(uid % 2),
        text=f"sch\u00f6n {uid}",
        reward=float(rng.random()),
        routes=routes,
    )


def made_by(rank):
    """Rank 2 has none, as one that leads none; some samples lack probabilities, one all routes."""
    if rank == 2:
        return []
    samples = [
        sample(10 * i + rank, prompt=2 + i, response=1 + rank + i, probs=i != 1) for i in range(3)
    ]
    samples[2].routes = None if rank == 3 else samples[2].routes
    if rank == 0:  # half a character, as a decoder may leave it; and nothing at all
        samples[0].text, samples[1].text = "\ud83d", ""
    return samples


def readers_of(uid):
    return [(uid + 1) % WORLD, (uid + 2) % WORLD]


def exchanged():
    """What a rank has once samples and routes have travelled."""
    world = dist.group.WORLD
    samples, held = exchange_samples(made_by(dist.get_rank()), world)
    deliver_routes(samples, [readers_of(s.uid) for s in samples], held, world)
    return samples


def failing():
    """The error that a rank sees when one of them brings an error, and which."""
    rank = dist.get_rank()
    mine = made_by(rank)
    if rank == 1:
        mine = RunFailed("no servers")
    elif rank == 3:
        mine = UserError("no such thing")
    try:
        exchange_samples(mine, dist.group.WORLD)
    except (RunFailed, UserError) as error:
        return type(error), str(error)


def small():
    return exchanged(), failing(), exchange_samples([], dist.group.WORLD)


@pytest.fixture(scope="module")
def found():
    """Samples, error and nothing, by rank."""
    return run_ranks(WORLD, small)


def test_every_rank_has_all_samples_and_the_routes_that_it_reads(found):
    expected = {s.uid: s for rank in range(WORLD) for s in made_by(rank)}
    for rank, (samples, _, _) in enumerate(found):
        assert [s.uid for s in samples] == sorted(expected)
        for got in samples:
            want = expected[got.uid]
            assert dataclasses.replace(got, routes=None) == dataclasses.replace(want, routes=None)
            if want.routes is None or rank not in readers_of(got.uid):
                assert got.routes is None
                continue
            for name in ("experts", "probs", "positions"):
                np.testing.assert_array_equal(getattr(got.routes, name), getattr(want.routes, name))


def test_the_first_error_is_every_rank_s(found):
    assert [error for _, error, _ in found] == [(RunFailed, "no servers")] * WORLD


def test_no_sample_at_all(found):
    assert [nothing for _, _, nothing in found] == [([], {})] * WORLD


MIB = 2**20


def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def peak_of_a_large_exchange(everyone):
    """Bytes of all routes, and by how much this rank's memory grew at its peak."""
    rank, world, number = dist.get_rank(), dist.group.WORLD, 8
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    mine = [sample(WORLD * i + rank, prompt=10, response=10) for i in range(number)]
    for s in mine:
        s.routes = SampleRoutes(experts=np.full((19, 25_000, 8), rank, dtype=np.int16))
    samples, held = exchange_samples(mine, world)
    readers = [range(WORLD) if everyone else [(s.uid + 1) % WORLD] for s in samples]
    deliver_routes(samples, readers, held, world)
    kept = sum(s.routes.experts.nbytes for s in samples if s.routes)
    total = WORLD * number * 19 * 25_000 * 8 * 2
    return total, kept, resident("VmHWM") - before


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="a file of Linux")
def test_an_exchange_takes_little_more_memory_than_what_is_kept():
    """The exchange of pickled objects took twice the ranks' number times the largest part."""
    for total, kept, peak in run_ranks(WORLD, peak_of_a_large_exchange, True):
        assert total == kept > 200 * MIB
        assert peak <= 1.5 * total
    for total, kept, peak in run_ranks(WORLD, peak_of_a_large_exchange, False):
        assert kept == total / WORLD
        # What it made and what it keeps; never the others'.
        assert peak <= 0.75 * total


def test_a_file_holds_samples_whole(tmp_path):
    samples = [s for rank in range(WORLD) for s in made_by(rank)]
    empty = sample(99, prompt=1, response=1)  # a token is fed, and probabilities are kept nowhere
    kept = {"probs": empty.routes.probs[:0], "positions": empty.routes.positions[:0]}
    samples.append(dataclasses.replace(empty, routes=dataclasses.replace(empty.routes, **kept)))
    write_samples(tmp_path / "x.safetensors", samples)
    again = read_samples(tmp_path / "x.safetensors")
    for before, after in zip(samples, again, strict=True):
        routes, found = (vars(s.routes or SampleRoutes(experts=0)) for s in (before, after))
        for name, array in routes.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
            assert getattr(found[name], "dtype", None) == getattr(array, "dtype", None)
        before.routes = after.routes = None
        assert after == before


@pytest.mark.parametrize("damage", ["torn", "gone", "other"])
def test_a_damaged_file_is_one_line(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_samples(path, made_by(1))
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "gone":
        path.unlink()
    else:
        save_file({"rows": torch.zeros(1, 5)}, path)
    with pytest.raises(UserError, match=rf"^{path}: expected responses .*checkpoint$") as caught:
        read_samples(path)
    assert "\n" not in str(caught.value)
