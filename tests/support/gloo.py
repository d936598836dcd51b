"""Run a function in processes of their own that are joined by gloo."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.support import forked


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """``function(*args)`` on every rank of a new gloo world; its results in rank order.

    ``function`` must be importable (a module-level function) and return what pickles. The store
    is a file, so no port is taken. A rank that raises fails the call with its traceback; a world
    that takes longer than ``timeout`` seconds is killed and fails it too.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            forked.start(
                _rank_main, rank, world_size, f"{folder}/store", sender, function, args, timeout
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


def _rank_main(rank, world_size, store, sender, function, args, timeout) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # As bytes: tensors sent as such would live in this process's shared memory.
        sender.send_bytes(pickle.dumps((None, function(*args))))
        if dist.is_initialized():  # ``function`` may have left it for worlds of its own
            dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        raise
