"""Which groups of a step are shown to whoever follows the run."""

from collections.abc import Sequence
from itertools import islice
from statistics import fmean

import torch

from sapo_megatron.data.tokenizer import Tokenizer
from sapo_megatron.runs.samples import Picked, ShownGroup, ShownResponse
from sapo_megatron.sample import Group, Sample
from sapo_megatron.splitmix import splitmix64


def shown_groups(
    groups: Sequence[Group], step: int, most: int, tokenizer: Tokenizer
) -> list[ShownGroup]:
    """At most ``most`` of a step's groups, which have advantages: those with the highest and the
    lowest mean reward, unless ``most`` is 1, and others at random.

    The choice depends on the step and the rewards alone, and draws no random number.
    """
    order = splitmix64(torch.arange(len(groups)) + (step << 32)).argsort().tolist()
    rewards = [fmean(sample.reward for sample in group.samples) for group in groups]
    picked: dict[int, Picked] = {}
    if most > 1:
        picked[max(order, key=rewards.__getitem__)] = "best"
        picked[min(order, key=rewards.__getitem__)] = "worst"
    picked |= {i: "random" for i in order if i not in picked}
    return [
        ShownGroup(
            step=step,
            picked=why,
            prompt=_clean(tokenizer.spell(groups[i].prompt.tokens)),
            answer=_clean(groups[i].prompt.answer),
            task=_clean(groups[i].prompt.task),
            responses=tuple(_response(sample, step, tokenizer) for sample in groups[i].samples),
        )
        for i, why in islice(picked.items(), most)
    ]


def _response(sample: Sample, step: int, tokenizer: Tokenizer) -> ShownResponse:
    versions = sample.versions or [step - 1]
    stop = None
    if not sample.truncated:
        last = sample.response_tokens[-1]
        stop = _clean(tokenizer.spell([last])) or f"token {last}"
    return ShownResponse(
        text=_clean(sample.text),
        reward=sample.reward,
        advantage=sample.advantage,
        tokens=len(sample.response_tokens),
        truncated=sample.truncated,
        stop_token=stop,
        staleness_mean=step - 1 - fmean(versions),
        staleness_max=step - 1 - min(versions),
    )


def _clean(text: str) -> str:
    """The text with escapes in the place of the half characters that a decoder may leave."""
    return text.encode(errors="backslashreplace").decode()
