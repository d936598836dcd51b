"""Var[log r] split into weights, router and covariance.

For a token, with theta the current weights, old those that sampled, and e the experts that each of
them routes to:

    z = log pi_theta(e_theta) - log pi_old(e_old) = a + b
    a = log pi_theta(e_old) - log pi_old(e_old)      weights, at the experts of the old policy
    b = log pi_theta(e_theta) - log pi_theta(e_old)  router

    Var z = Var a + Var b + 2 Cov(a, b)

Only the sets of experts are held in a: how the current router weighs the experts of the old one
counts as weights. The router's share of Var z is Cov(b, z) / Var z = (Var b + Cov(a, b)) / Var z,
which is 0 where the routers choose alike and adds up to 1 with the share of the weights.

All logarithms are natural, so variances are in nats^2; all variances are population variances.
"""

from torch import Tensor

from sapo_megatron.metrics import Covariance, Mean, Metrics, Share, Variance

BUCKETS = (
    ("0", 0, 0),
    ("1", 1, 1),
    ("2", 2, 2),
    ("3-4", 3, 4),
    ("5-8", 5, 8),
    ("9-16", 9, 16),
    ("17+", 17, 1 << 30),
)
"""Name, least and greatest number of layers whose experts changed."""


def split_metrics(
    z: Tensor,
    a: Tensor,
    mask: Tensor,
    *,
    layers_flipped: Tensor | None,
    num_layers: int,
    repeated: Tensor,
) -> Metrics:
    """``variance/*`` of a micro-batch's tokens ``[T]``, by the names of the module docstring.

    ``layers_flipped`` int [T] of ``num_layers`` with experts (None: there are none); ``repeated``
    [T]: the difference that the same forward makes when it runs twice, whose variance is the noise
    floor.
    ``variance/cov`` is 2 Cov(a, b), so that weights, router and cov add up to total.
    """
    z, a = z.double(), a.double()
    b = z - a
    metrics = Metrics()
    metrics.add("variance/total", Variance.of(z, mask))
    metrics.add("variance/weights", Variance.of(a, mask))
    metrics.add("variance/router", Variance.of(b, mask))
    metrics.add("variance/cov", Covariance.of(2 * a, b, mask))
    metrics.add("variance/router_share", Share.of(a, b, mask))
    metrics.add("variance/noise", Variance.of(repeated, mask))
    if layers_flipped is not None:
        for name, least, greatest in BUCKETS:
            if least > num_layers:
                break
            inside = (layers_flipped >= least) & (layers_flipped <= greatest)
            metrics.add(f"variance/by_layers/{name}", Variance.of(z, mask & inside))
            metrics.add(f"variance/by_layers_share/{name}", Mean.of(inside, mask))
    return metrics
