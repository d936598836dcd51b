"""All samples of some groups scored at once."""

from sapo_megatron.metrics import Metrics
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.sample import Group


def score(scorer: Scorer, groups: list[Group]) -> Metrics:
    """What ``scorer`` finds."""
    for group in groups:
        for sample in group.samples:
            scorer.begin(group.prompt, sample)
    return scorer.finish()
