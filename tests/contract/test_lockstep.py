"""Functions in lockstep: their order, their errors, and the state they run in."""

import contextvars
import threading

import pytest
import torch

from normlab.norms.lockstep import Astray, Lockstep


def totals(place, values):
    return [(place, sum(values), value) for value in values]


def test_they_run_one_at_a_time_in_order():
    events = []

    def join(place, values):
        events.append(("join", place, tuple(values)))
        return [10 * value for value in values]

    lockstep = Lockstep(join)

    def work(number):
        for place in ("a", "b"):
            events.append((place, number))
            assert lockstep.meet(place, number) == 10 * number
        events.append(("end", number))
        return number**2

    results = lockstep.run([lambda n=n: work(n) for n in range(3)])
    assert results == [0, 1, 4]
    rounds = [[(place, n) for n in range(3)] for place in ("a", "b", "end")]
    joins = [("join", place, (0, 1, 2)) for place in ("a", "b")]
    assert events == [*rounds[0], joins[0], *rounds[1], joins[1], *rounds[2]]


def test_functions_that_never_meet():
    assert Lockstep(totals).run([lambda: 1, lambda: 2]) == [1, 2]
    assert Lockstep(totals).run([lambda: 1]) == [1]


def test_one_function_meets_itself():
    lockstep = Lockstep(totals)
    assert lockstep.run([lambda: lockstep.meet("here", 4)]) == [("here", 4, 4)]


def test_inside():
    lockstep = Lockstep(totals)
    assert lockstep.run([lambda: lockstep.inside]) == [True]
    assert not lockstep.inside


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_error_ends_all(culprit, after):
    lockstep = Lockstep(totals)
    unwound, before = [], threading.active_count()

    def work(number):
        try:
            for meeting in range(2):
                if (number, meeting) == (culprit, after):
                    raise KeyError("mine")
                # What a model might do: no error of another function is its to catch.
                try:
                    lockstep.meet(meeting, number)
                except Exception:  # pragma: no cover
                    unwound.append("caught")
            if (number, 2) == (culprit, after):
                raise KeyError("mine")
        finally:
            unwound.append(number)

    with pytest.raises(KeyError, match="mine") as raised:
        lockstep.run([lambda n=n: work(n) for n in range(3)])
    assert f"number {culprit} of 3" in raised.value.__notes__[0]
    started = 3 if after else culprit + 1
    assert sorted(unwound) == list(range(started))
    assert threading.active_count() == before
    assert lockstep.run([lambda: lockstep.meet("again", 1)]) == [("again", 1, 1)]


def test_an_error_of_join_is_nobodys_to_catch():
    def join(place, values):
        raise ValueError("cannot join")

    lockstep = Lockstep(join)

    def work():
        try:
            lockstep.meet("here", 0)
        except ValueError:
            return "caught"

    with pytest.raises(ValueError, match="cannot join"):
        lockstep.run([work, work])


def test_an_interrupt_of_a_function_reaches_the_caller():
    lockstep = Lockstep(totals)

    def interrupted():
        lockstep.meet("here", 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lockstep.run([interrupted, lambda: lockstep.meet("here", 1)])


@pytest.mark.parametrize(
    ("ways", "places"),
    [(["ab", "ac"], ["b", "c"]), (["ab", "a"], ["b", None]), (["", "a", ""], [None, "a", None])],
)
def test_different_ways(ways, places):
    lockstep = Lockstep(totals)

    def work(way):
        for place in way:
            lockstep.meet(place, 0)

    with pytest.raises(Astray) as raised:
        lockstep.run([lambda way=way: work(way) for way in ways])
    assert raised.value.places == places


def test_the_state_of_the_caller_holds():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(3)

    def state():
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_device().type,
            torch.get_default_dtype(),
            variable.get(),
        )

    def seen():
        expected = state()
        assert Lockstep(totals).run([state, state]) == [expected] * 2
        return expected

    plain = seen()
    with torch.no_grad():
        assert seen()[0] is False
    with torch.autocast("cpu", torch.float16):
        assert seen()[1:3] == (True, torch.float16)
    with torch.device("meta"):
        assert seen()[3] == "meta"
    torch.set_default_dtype(torch.float64)
    try:
        assert seen()[4] == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen() == plain


def test_answers_are_freed_where_they_are_used():
    import weakref

    lockstep = Lockstep(lambda place, values: [torch.zeros(1) for _ in values])
    alive = []

    def work(number):
        answer = lockstep.meet("here", None)
        alive.append(weakref.ref(answer))
        del answer
        assert all(reference() is None for reference in alive)

    lockstep.run([lambda n=n: work(n) for n in range(3)])
    assert len(alive) == 3
