"""How servers get the policy's weights: each node's memory, a folder that all share, or NCCL.

Two steps, each collective over all ranks: ``write`` takes the weights from the model, ``load`` puts
them into the servers, which then must give a probe the log-probs that the training engine gives it.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.policy import parallel
from sapo_megatron.policy.parallel import Nodes
from sapo_megatron.policy.step import Policy

if TYPE_CHECKING:  # they import httpx, which a run without servers has no use for
    from sapo_megatron.rollout.vllm.engine import VllmEngine
    from sapo_megatron.rollout.vllm.fleet import Probe
    from sapo_megatron.rollout.vllm.transfer import Transfer

logger = logging.getLogger(__name__)

NODE_MEMORY = Path("/dev/shm")
"""A file system in the memory of a node."""
KEPT_FREE = 2**30
"""Bytes of it that a hand-over leaves to others."""


class Handover(Protocol):
    """Brings the policy's present weights to the servers."""

    def write(self) -> Metrics:
        """Take the weights from the model, which may leave its device then."""

    def load(self, probe: Probe, version: int) -> float:
        """Put them into the servers; the probe's largest difference.

        ``version`` is what samples tell of them.

        Raises RunFailed where a server does not take them.
        """


class OverFolder:
    """By a folder: one that all nodes and servers share, or one in the memory of each node."""

    def __init__(
        self, policy: Policy, servers: VllmEngine | None, folder: Path, nodes: Nodes | None = None
    ) -> None:
        """``servers``: on the ranks that speak to some; ``nodes``: each has this folder."""
        self._policy = policy
        self._servers = servers
        self._folder = folder.absolute()
        self._nodes = nodes
        self._written_before = False

    def write(self) -> Metrics:
        weights, metrics = self._policy.model.weights, Metrics()
        if self._nodes is None:
            weights.save(self._folder)
            return metrics
        written = weights.save_on_nodes(self._folder, self._nodes)
        if dist.get_rank() == 0:
            metrics.add("rollout/handover_bytes", Mean(float(written.bytes), 1.0))
            if self._written_before:
                share = written.changed / written.bytes
                metrics.add("rollout/handover_changed_share", Mean(share, 1.0))
        self._written_before = True
        return metrics

    def load(self, probe: Probe, version: int) -> float:
        difference = 0.0
        with parallel.failing_together(self._policy.groups):
            if self._servers is not None:
                difference = max(self._servers.load(self._folder, probe, version).values())
        return parallel.greatest(self._policy.groups, difference)


class OverNccl:
    """Tensor by tensor, by the first rank's ``transfer``."""

    def __init__(
        self, policy: Policy, servers: VllmEngine | None, transfer: Transfer | None
    ) -> None:
        self._policy = policy
        self._servers = servers
        self._transfer = transfer

    def write(self) -> Metrics:
        return Metrics()

    def load(self, probe: Probe, version: int) -> float:
        found: dict[str, float] = {}
        tensors = self._policy.model.weights.stream()
        with parallel.failing_together(self._policy.groups):
            try:
                if self._servers is not None:
                    assert self._transfer is not None
                    send = functools.partial(self._transfer.send, tensors)
                    found = self._servers.receive(send, probe, version)
            finally:
                for _ in tensors:  # others wait for the first rank to take their tensors
                    pass
        return parallel.greatest(self._policy.groups, max(found.values(), default=0.0))


def folder_in_memory(policy: Policy, nodes: Nodes) -> Path | None:
    """A new folder's name in the memory of every node; None where the weights do not fit there.

    Collective over all ranks.
    """
    groups = policy.groups
    listing = policy.model.weights.listing()
    needed = sum(listed.dtype.itemsize * math.prod(listed.shape) for listed in listing)
    free = shutil.disk_usage(NODE_MEMORY).free if NODE_MEMORY.is_dir() else 0
    least = -parallel.greatest(groups, -float(free))
    if needed + KEPT_FREE > least:
        if dist.get_rank() == 0:
            logger.info(
                "weights of %.1f GiB do not fit into %s, of which a node has %.1f GiB free: they "
                "go by the run's folder, which all nodes must see",
                needed / 2**30,
                NODE_MEMORY,
                least / 2**30,
            )
        return None
    name = parallel.on_first_rank(groups, lambda: f"sapo-megatron-{uuid.uuid4().hex}")
    return NODE_MEMORY / f"{name}-{nodes.number}"
