"""When responses are asked for and trained on: what comes in any order, at once or in between."""

import heapq
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.rollout.schedule import Request, Schedule, Slot, Train, Wait

BATCH = 4


def schedule(ahead, *, steps=5, rounds=8, **state):
    return Schedule(batch=BATCH, ahead=ahead, steps=steps, rounds=rounds, **state)


def at_once(state, keep=lambda number: True):
    """What an engine is asked that answers before anything else happens: (request or None)."""
    said = []
    while state.done < state.steps:
        state, action = state.next()
        assert not isinstance(action, Wait)
        if isinstance(action, Request):
            kept = {n for n in action.numbers if keep(n)}
            state = state.arrived(kept, set(action.numbers) - kept)
            said.append(("ask", [*action.numbers], action.weights))
        else:
            said.append(("train", [*action.numbers]))
            state = state.trained()
    return said


def batches(*numbers):
    return [list(range(BATCH * n, BATCH * (n + 1))) for n in numbers]


def test_nothing_ahead_is_a_batch_a_step():
    (a, b, c) = batches(0, 1, 2)
    assert at_once(schedule(0, steps=3)) == [
        *(("ask", a, 0), ("train", a)),
        *(("ask", b, 1), ("train", b)),
        *(("ask", c, 2), ("train", c)),
    ]


def test_two_ahead_and_the_last_steps_ask_for_nothing():
    a, b, c, d, e = batches(0, 1, 2, 3, 4)
    assert at_once(schedule(2)) == [
        *(("ask", a, 0), ("ask", b, 0), ("ask", c, 0), ("train", a)),
        *(("ask", d, 1), ("train", b)),
        *(("ask", e, 2), ("train", c)),
        *(("train", d), ("train", e)),
    ]


@pytest.mark.parametrize("ahead", [0, 1, 3, 8])
def test_what_trains_is_so_many_steps_old(ahead):
    asked = {}
    for step, *rest in at_once(schedule(ahead, steps=7)):
        if step == "ask":
            asked |= dict.fromkeys(rest[0], rest[1])
    ages = [number // BATCH - weights for number, weights in sorted(asked.items())]
    assert ages == [min(number // BATCH, ahead) for number in range(7 * BATCH)]


def test_groups_in_the_place_of_dropped_ones_come_before_later_batches():
    dropped = {1, 4, 6}
    assert at_once(schedule(1, steps=2), lambda n: n not in dropped) == [
        ("ask", [0, 1, 2, 3], 0),
        ("ask", [4], 0),  # the first batch is filled first
        ("ask", [5], 0),
        ("ask", [6, 7, 8, 9], 0),
        ("ask", [10], 0),
        ("train", [0, 2, 3, 5]),
        ("train", [7, 8, 9, 10]),
    ]


def test_a_step_makes_do_after_so_many_rounds():
    asked = at_once(schedule(0, steps=2, rounds=3), lambda n: n == 2 or n > 9)
    assert asked == [
        *(("ask", [0, 1, 2, 3], 0), ("ask", [4, 5, 6], 0), ("ask", [7, 8, 9], 0)),
        ("train", [2]),
        *(("ask", [10, 11, 12, 13], 1), ("train", [10, 11, 12, 13])),
    ]
    asked = at_once(schedule(1, steps=2, rounds=2), lambda n: False)
    assert [said for said in asked if said[0] == "train"] == [("train", [])] * 2
    assert (
        len(asked) == 2 * 2 + 1 + 2 + 1
    )  # two batches' rounds, then those of the one that is left


def test_new_weights_wait_for_what_is_under_way():
    state, _ = schedule(1).next()
    state, request = state.next()
    assert request == Request(range(4, 8), 0)
    state, action = state.next()
    assert action == Wait()
    state, action = state.arrived(set(range(4)), set()).next()
    assert action == Train((0, 1, 2, 3))
    assert state.next() == (state, Wait())  # both batches are asked for and not yet trained on
    state = state.trained()
    assert state.next() == (state, Wait())  # the second is still under way
    state, action = state.arrived(set(range(4, 8)), set()).next()
    assert action == Request(range(8, 12), 1)
    assert state.next()[1] == Train((4, 5, 6, 7))


def test_a_queue_that_is_there_already_is_trained_first():
    here = tuple(Slot(number=n, weights=0, here=True) for n in range(9))
    state, action = schedule(0, steps=9, done=3, asked=9, slots=here).next()
    assert action == Train((0, 1, 2, 3))
    state, action = state.trained().next()
    assert action == Train((4, 5, 6, 7))
    assert state.trained().next()[1] == Request(range(9, 12), 5)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 4), st.floats(0, 0.9), st.integers())
def test_groups_that_come_one_by_one_in_any_order(ahead, steps, rounds, drop, seed):
    """While a step trains and while none does, as servers answer."""
    draw = random.Random(seed)
    state, flying, kept, trained = schedule(ahead, steps=steps, rounds=rounds), {}, [], []
    training = 0
    while state.done < steps:
        state, action = state.next()
        if isinstance(action, Request):
            assert action.weights == state.done
            assert set(flying.values()) <= {state.done}, "none under way with older weights"
            flying |= dict.fromkeys(action.numbers, action.weights)
            untrained = len(flying) + len(kept) + training
            assert untrained <= (ahead + 1) * BATCH
            assert untrained <= (steps - state.done) * BATCH
        elif isinstance(action, Train):
            assert not training
            oldest = sorted([*flying, *kept])[:BATCH]
            assert list(action.numbers) == oldest, "whole groups, in order"
            assert len(oldest) == BATCH or not flying
            kept = [number for number in kept if number not in oldest]
            trained += oldest
            training = BATCH
        elif training and (not flying or draw.random() < 0.3):
            state, training = state.trained(), 0
        else:
            number = draw.choice(sorted(flying))
            del flying[number]
            if draw.random() < drop:
                state = state.arrived((), {number})
            else:
                state = state.arrived({number}, ())
                kept.append(number)
    assert not flying
    assert trained == sorted(trained)
    assert drop > 0 or trained == list(range(steps * BATCH))


def simulated(ahead, *, waits, update, steps=24):
    """Time per step of a trainer and of servers with a slot per group of a batch; what trained.

    One group in sixteen takes ten times as long as the others.
    """
    batch = 16
    lengths = [10.0 if n % 16 == n // 16 % 16 else 1.0 for n in range(steps * batch)]
    state = Schedule(batch=batch, ahead=ahead, steps=steps, rounds=1, waits=waits)
    slots, asked, here, trained, now = [0.0] * batch, deque(), {}, [], 0.0
    while state.done < steps:
        state, action = state.next()
        if isinstance(action, Request):
            asked.append(action.numbers)
            for number in action.numbers:
                here[number] = max(heapq.heappop(slots), now) + lengths[number]
                heapq.heappush(slots, here[number])
        elif isinstance(action, Train):
            trained += [lengths[n] for n in action.numbers]
            now += update
            state = state.trained()
        else:
            numbers = asked.popleft()
            now = max(now, *(here[n] for n in numbers))
            state = state.arrived(set(numbers), set())
    assert trained == lengths, "none is left out for its length, and none comes before its turn"
    return now / steps


@pytest.mark.parametrize("update", [3.0, 4.0, 5.0])
def test_what_steps_ahead_gain_where_one_response_in_sixteen_is_long(update):
    alone = simulated(0, waits=True, update=update)
    assert alone == 10 + update
    assert simulated(1, waits=True, update=update) < 1.1 * max(10, update)
    for waits, most in ((True, 0.75), (False, 0.45)):
        assert simulated(4, waits=waits, update=update) < most * alone
