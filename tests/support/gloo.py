"""Run a function in processes of their own that are joined by gloo."""

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sapo_megatron.policy import parallel
from tests.support import forked

TIMEOUT_S = 240.0
"""Beyond it a collective of a small world that has gone wrong gives up."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 600.0,
    fresh: bool = False,
) -> list[Any]:
    """``function(*args)`` on every rank of a new gloo world; its results in rank order.

    ``function`` must be importable (a module-level function) and return what pickles. The store
    is a file, so no port is taken. A rank that raises fails the call with its traceback; a world
    that takes longer than ``timeout`` seconds is killed and fails it too. ``fresh`` as in
    :func:`tests.support.forked.start`.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            forked.start(
                *(_rank_main, rank, world_size, f"{folder}/store", sender, function, args, timeout),
                fresh=fresh,
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for _, sender in pipes:
            sender.close()
        deadline = time.monotonic() + timeout
        try:
            results = []
            for rank, (receiver, _) in enumerate(pipes):
                if not receiver.poll(max(deadline - time.monotonic(), 0.0)):
                    raise TimeoutError(f"rank {rank} of {world_size} gave no result in {timeout} s")
                try:
                    failure, result = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    raise RuntimeError(f"rank {rank} of {world_size} died") from None
                if failure:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{failure}")
                results.append(result)
            return results
        finally:
            for process in ranks:
                process.join(max(min(deadline - time.monotonic(), 10.0), 0.0))
                if process.is_alive():
                    process.kill()
                    process.join()


def run_worlds(
    function: Callable[..., Any], cases: Sequence[tuple[int, tuple[Any, ...]]]
) -> list[list[Any] | str]:
    """``function(*args)`` of each case ``(world size, args)`` on every rank of a world of its own.

    The ranks are started once. By case: the results in rank order, or the tracebacks as text. The
    largest worlds come first, each made of the first processes, so that none waits for another.
    """
    order = sorted(range(len(cases)), key=lambda i: -cases[i][0])
    with tempfile.TemporaryDirectory() as folder:
        largest = cases[order[0]][0]
        ordered = [cases[i] for i in order]
        ranks = run_ranks(largest, _walk, function, ordered, folder)
    found: dict[int, list[Any] | str] = {}
    for place, i in enumerate(order):
        outcomes = [rank[place] for rank in ranks[: cases[i][0]]]
        failures = [failure for failure, _ in outcomes if failure]
        found[i] = "\n".join(failures) or [result for _, result in outcomes]
    return [found[i] for i in range(len(cases))]


def _walk(function, cases, folder) -> list[tuple[str | None, Any]]:
    rank = dist.get_rank()
    dist.destroy_process_group()  # the world that started these processes
    outcomes: list[tuple[str | None, Any]] = []
    for i, (size, args) in enumerate(cases):
        if rank >= size:
            break
        _join(f"{folder}/{i}", rank, size, TIMEOUT_S)
        try:
            outcomes.append((None, function(*args)))
        except Exception:
            outcomes.append((traceback.format_exc(), None))
        parallel.teardown()
        gc.collect()  # a model is full of cycles that hold its groups, and a group has threads
        if dist.is_initialized():  # the program ends its own
            dist.destroy_process_group()
    return outcomes


def _join(store: str, rank: int, size: int, timeout: float) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    dist.barrier()  # over the world, whose last rank may still be connecting to the first


def _rank_main(rank, world_size, store, sender, function, args, timeout) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        _join(store, rank, world_size, timeout)
        # As bytes: tensors sent as such would live in this process's shared memory.
        sender.send_bytes(pickle.dumps((None, function(*args))))
        if dist.is_initialized():  # ``function`` may have left it for worlds of its own
            dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        raise
