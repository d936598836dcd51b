"""The bound of SAPO's analysis, checked live.

With g(z) = sech^2(tau z / 2), the gate as a function of the log-ratio, and Var_i the population
variance of log r within sequence i,

    D_i = |mean_t g(z_it) - g(mean_t z_it)| <= tau^2 / 4 Var_i

for every sequence, since |g''| <= tau^2 / 2. The gate itself depends on r - 1, for which g puts
log r: ``sapo/gate_distance`` is the distance |mean_t w(r_it) - g(mean_t z_it)| with the true w.

Variances are population variances, in nats^2 (arXiv 2511.20347).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.metrics import Histogram, Mean, Metrics, Points, Sum
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.objective.reduce import sequence_mean
from sapo_megatron.objective.sapo import sapo_weight, token_temperature
from sapo_megatron.sample import Temperatures

SMALL_DISPERSION = 0.02
"""nats^2; the paper finds Var_i mostly below it (arXiv 2511.20347, figures 2 and 3)."""
VARIANCE_EDGES = tuple(i / 500 for i in range(101))
"""Bins of the histogram of Var_i: 0 to 0.2 nats^2 by 0.002; larger ones count in the last bin."""


@torch.no_grad()
def bound_metrics(
    r: Ratio,
    temperatures: Temperatures,
    sequence_ids: Tensor,
    lengths: Tensor,
    cp_group: dist.ProcessGroup | None = None,
) -> Metrics:
    """The paper's bound on a micro-batch: ``sapo/bound_*`` and what goes with it, by sequence.

    Tokens [T], ``sequence_ids`` int [T] into ``lengths`` int [S], the valid tokens of each whole
    sequence. Collective over ``cp_group``; its first rank alone has metrics.
    """
    whole = (r.mask, sequence_ids, lengths, cp_group)
    z = r.log_ratio.double()
    tau = token_temperature(r.advantages.double(), temperatures)
    mean = sequence_mean(z, *whole)
    variance = sequence_mean((z - mean[sequence_ids]).square(), *whole)
    gates = sequence_mean(_gate_of_log_ratio(z, tau), *whole)
    weights = sequence_mean(sapo_weight(z.exp(), tau), *whole)
    taus = sequence_mean(tau, *whole)
    at_mean = _gate_of_log_ratio(mean, taus)

    metrics = Metrics()
    if cp_group is not None and cp_group.rank() > 0:
        return metrics
    valid = lengths > 0
    distance, bound = (gates - at_mean).abs(), taus.square() / 4 * variance
    # The slack is that of fp64 sums of numbers up to 1.
    violated = distance > bound * (1 + 1e-9) + 1e-12
    metrics.add("sapo/bound_lhs", Mean.of(distance, valid))
    metrics.add("sapo/bound_rhs", Mean.of(bound, valid))
    metrics.add("sapo/bound_violations", Sum((violated & valid).sum().double()))
    metrics.add("sapo/bound_points", Points.of(bound[valid], distance[valid]))
    metrics.add("sapo/gate_distance", Mean.of((weights - at_mean).abs(), valid))
    metrics.add("sapo/seq_var", Mean.of(variance, valid))
    metrics.add("sapo/hist_seq_var", Histogram.of(variance, VARIANCE_EDGES, valid))
    metrics.add("sapo/small_dispersion_share", Mean.of(variance < SMALL_DISPERSION, valid))
    return metrics


def _gate_of_log_ratio(z: Tensor, tau: Tensor) -> Tensor:
    """g(z) = sech^2(tau z / 2): the gate's weight with log r in the place of r - 1."""
    return sapo_weight(1 + z, tau)
