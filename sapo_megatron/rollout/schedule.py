"""When responses are asked for, and when what came is trained on: a pure state machine.

Events go in (:meth:`Schedule.arrived`, :meth:`Schedule.trained`) and give a new state; a state says
what to do next (:meth:`Schedule.next`). It counts groups, oldest first, and knows neither prompts
nor engines: the same for one that generates while everybody waits and for one in the background.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Request:
    """Ask for these groups, with the weights behind so many steps, which are the newest."""

    numbers: range
    weights: int


@dataclass(frozen=True)
class Train:
    """Train a step on these groups; none where rounds have brought nothing to train on."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """Nothing can be done before the oldest groups under way have arrived, or a step is through."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A group that was asked for and is not dropped nor trained on."""

    number: int
    """In the order of asking, from 0."""
    weights: int
    """Steps behind the weights that answer."""
    here: bool = False


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """At most ``ahead + 1`` batches of groups are asked for and not yet trained on.

    So a batch is answered by weights from ``ahead`` steps before it trains, the first ones aside,
    and no group is asked for that the last step would leave.
    """

    batch: int
    """Groups of a step."""
    ahead: int
    steps: int
    """Of the whole run."""
    rounds: int
    """Requests for a batch before its step makes do with what has arrived."""
    waits: bool = True
    """Whether new weights wait for what is under way with older ones."""
    done: int = 0
    """Steps that are trained."""
    training: bool = False
    asked: int = 0
    """Groups, ever."""
    left: int | None = None
    """Requests before the next step; None: as many as what it wants takes."""
    slots: tuple[Slot, ...] = ()
    """Oldest first."""

    def next(self) -> tuple["Schedule", Request | Train | Wait]:
        """What to do, and the state in which it is being done.

        A request ends where a batch does, so that groups in the place of dropped ones come before
        those of later steps. Where new weights have to wait, training goes on meanwhile with what
        is here.
        """
        batches = min(self.ahead + 1, self.steps - self.done) - self.training
        wanted = batches * self.batch - len(self.slots)
        left = self.rounds * -(-wanted // self.batch) if self.left is None else self.left
        older = any(not slot.here and slot.weights < self.done for slot in self.slots)
        if wanted > 0 and left > 0 and not (self.waits and older):
            count = min(wanted, self.batch - len(self.slots) % self.batch)
            numbers = range(self.asked, self.asked + count)
            slots = tuple(Slot(number=number, weights=self.done) for number in numbers)
            slots = self.slots + slots
            asking = replace(self, asked=numbers.stop, left=left - 1, slots=slots)
            return asking, Request(numbers, self.done)
        first = self.slots[: self.batch]
        if self.training or not all(slot.here for slot in first):
            return self, Wait()
        training = replace(self, training=True, left=None, slots=self.slots[len(first) :])
        return training, Train(tuple(slot.number for slot in first))

    def arrived(self, kept: Collection[int], dropped: Collection[int]) -> "Schedule":
        """Groups that are here; what is dropped makes room for others."""
        slots = (slot for slot in self.slots if slot.number not in dropped)
        here = tuple(replace(s, here=True) if s.number in kept else s for s in slots)
        return replace(self, slots=here)

    def trained(self) -> "Schedule":
        """The step that was training is through."""
        assert self.training, "Train comes first"
        return replace(self, training=False, left=None, done=self.done + 1)
