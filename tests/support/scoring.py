"""All samples of some groups scored at once."""

from sapo_megatron.metrics import Metrics
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.sample import Group


def score(scorer: Scorer, groups: list[Group]) -> Metrics:
    """What ``scorer`` finds."""
    return scorer.finish([scorer.begin(g.prompt, sample) for g in groups for sample in g.samples])
