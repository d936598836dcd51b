"""The engine of a run's rollouts: in process, or vLLM servers that are given the policy's weights.

After every change of weights the servers must prove that they compute what the trainer computes:
the log-probs of a probe are compared, and a run whose engine disagrees stops.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from sapo_megatron.batch import micro_batches
from sapo_megatron.config import Recipe, RunFailed
from sapo_megatron.metrics import Max, Metrics
from sapo_megatron.policy import parallel
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.step import Policy
from sapo_megatron.rollout.collect import Engine
from sapo_megatron.rollout.generate import InProcess, Request, SamplingParams
from sapo_megatron.rollout.inputs import Inputs
from sapo_megatron.rollout.vllm import VllmEngine, Worker
from sapo_megatron.sample import Sample

logger = logging.getLogger(__name__)

PROBE_TOKENS = 64
PROBE_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.1}
"""By ``model.params_dtype``: mean absolute difference of log-probs, nats. Twice the rounding of
bf16 and a few experts chosen otherwise stay below it; weights that are wrong do not."""
