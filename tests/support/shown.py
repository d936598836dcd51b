"""Groups as ``samples.jsonl`` has them."""

from typing import Any

from sapo_megatron.runs.samples import ShownGroup, ShownResponse

HOSTILE = (
    "</pre></details><script>alert(1)</script>&lt;"
    "\x00\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egro\u200b"
)
"""What takes over a page or a terminal that shows it as it is."""
SEEN = (
    "</pre></details><script>alert(1)</script>&lt;"
    r"\x00\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egro\u200b"
)
"""What is shown in its place."""


def shown(step: int, picked: str, *responses: tuple[str, float], **changes: Any) -> ShownGroup:
    """A group of these texts and their rewards."""
    rest = {"advantage": 0.5, "tokens": 3, "truncated": False, "stop_token": "</s>"}
    rest |= {"staleness_mean": 0.0, "staleness_max": 0}
    made = tuple(ShownResponse(text=text, reward=reward, **rest) for text, reward in responses)
    values = {"prompt": "Calculate 1 + 2.", "answer": "3", "task": "sums", **changes}
    return ShownGroup(step=step, picked=picked, responses=made, **values)
