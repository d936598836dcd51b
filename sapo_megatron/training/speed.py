"""How fast a step was, also beside what its GPUs can do."""

from collections.abc import Sequence
from dataclasses import dataclass

from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.policy.flops import PEAK_TFLOPS, Parameters, Passes, forward_flops, frozen
from sapo_megatron.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Computes ``perf/*`` on one rank."""

    recipe: Recipe
    arch: Architecture
    parameters: Parameters
    ranks: int
    on_gpus: bool

    def measure(self, lengths: Sequence[int], metrics: Metrics, step_s: float) -> Metrics:
        """Of a step that took ``step_s`` seconds and has its times in ``metrics``.

        ``lengths``: tokens of each sequence, prompt and response. FLOPs are those of the model in
        old log-probs and updates, without what is computed again, over the seconds of both; MFU is
        their share of the peak of the GPU that ``cluster.gpu`` names, and is left out on CPUs.
        """
        speed = sum(lengths) / step_s
        passes = Passes(1 + frozen(self.recipe), 1)
        forward = sum(forward_flops(self.arch, self.parameters, length) for length in lengths)
        seconds = metrics["time/logprob"].value() + metrics["time/update"].value()
        tflops = passes.work * forward / seconds / self.ranks / 1e12
        found = {
            "tokens_per_s": speed,
            "tokens_per_s_per_gpu": speed / self.ranks,
            "tflops_per_gpu": tflops,
        }
        if self.on_gpus:
            found["mfu"] = tflops / PEAK_TFLOPS[self.recipe.cluster.gpu]
        measured = Metrics()
        for name, value in found.items():
            measured.add(f"perf/{name}", Mean(value, 1.0))
        return measured
