"""avg@k and greedy pass@1 on held-out problems."""

import logging
from collections.abc import Sequence

from sapo_megatron.errors import RunFailed
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.collect import Collector, rewards
from sapo_megatron.rollout.engine import SamplingParams
from sapo_megatron.sample import Prompt

logger = logging.getLogger(__name__)

SEED_OFFSET = 1
"""Evaluations draw the same noise every time, another than training's: they compare in pairs."""


def evaluate(
    collector: Collector, problems: Sequence[Prompt], recipe: Recipe, *, version: int
) -> dict[str, float]:
    """``{"avg@k": mean score of k samples a problem, "pass@1": mean score of greedy answers}``.

    Scores are the recipe's rewards; with rewards of 0 and 1 both are shares of right answers. What
    cannot be scored is in no mean, and told. ``version``: steps behind the policy. Collective over
    all ranks. Raises RunFailed where nothing can be scored.
    """
    config = recipe.eval

    def score(k: int, temperature: float, top_p: float) -> float:
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=recipe.rollout.max_response_length,
            stop_ids=collector.stop_ids,
            seed=recipe.train.seed + SEED_OFFSET,
        )
        responses = collector.respond(problems, k, params, version=version)
        samples = [s for group in responses.groups for s in group.samples]
        scored = [s for s in samples if s.scored]
        if len(scored) < len(samples):
            told = f"{len(samples) - len(scored)} of {len(samples)} responses could not be scored"
            if not scored:
                raise RunFailed(f"evaluation: {told}: {responses.problem}")
            logger.warning("evaluation: %s and do not count: %s", told, responses.problem)
        return float(rewards(scored).mean())

    return {
        f"avg@{config.k}": score(config.k, config.temperature, config.top_p),
        "pass@1": score(1, 0.0, 1.0),
    }
