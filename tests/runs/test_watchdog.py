"""A slow step and a run that stands still are told, with the host to look at."""

from __future__ import annotations

import pytest

from prefix_jax.runs.watchdog import Watchdog

HOSTS = ("alpha", "beta", "gamma", "delta")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def watch(clock: Clock, said: list[str]) -> Watchdog:
    return Watchdog(said.append, HOSTS, 0, clock)


def steps(watch: Watchdog, clock: Clock, seconds: list[float], busy=(0.1, 0.1, 0.1, 0.1)) -> None:
    for number, one in enumerate(seconds, 1):
        clock.now += one
        watch.step(number, one, busy)


def test_a_step_of_ten_medians_is_told(watch, clock, said) -> None:
    # The first step compiles: it is neither slow nor usual.
    steps(watch, clock, [120.0, 1.0, 1.1, 0.9, 1.0, 1.0, 9.9])
    assert said == []
    steps(watch, clock, [10.1])
    (line,) = said
    assert line.startswith("step 1 took 10.1 s, 10 times as long as usual: ")
    assert line.endswith("all 4 processes waited for the devices")


def test_the_process_whose_batch_the_others_waited_for_is_named(watch, clock, said) -> None:
    steps(watch, clock, [60.0, *[1.0] * 6])
    steps(watch, clock, [20.0], busy=(0.1, 0.1, 19.7, 0.2))
    assert said == [
        "step 1 took 20.0 s, 20 times as long as usual: process 2 of 4 on host gamma needed 19.7 s "
        "for its batch"
    ]


@pytest.mark.parametrize(
    ("busy", "cause"),
    [(19.7, "host alpha needed 19.7 s for its batch"), (0.1, "host alpha waited for the devices")],
)
def test_of_one_process_the_host_is_named(clock, said, busy: float, cause: str) -> None:
    alone = Watchdog(said.append, ["alpha"], 0, clock)
    steps(alone, clock, [60.0, *[1.0] * 6])
    steps(alone, clock, [20.0], busy=(busy,))
    assert said == [f"step 1 took 20.0 s, 20 times as long as usual: {cause}"]


def test_other_processes_leave_slow_steps_to_the_first(clock, said) -> None:
    steps(Watchdog(said.append, HOSTS, 1, clock), clock, [1.0] * 7 + [50.0])
    assert said == []


def test_few_steps_say_nothing_of_what_is_usual(watch, clock, said) -> None:
    steps(watch, clock, [60.0, 0.1, 0.1, 5.0])
    assert said == []


def test_a_hang_is_told_while_it_lasts_at_twice_the_time(watch, clock, said) -> None:
    steps(watch, clock, [60.0, *[1.0] * 6])
    for _ in range(60):
        clock.now += 5
        watch.check()
    assert [line.partition(" s ")[0] for line in said] == [
        f"no step has ended for {seconds}" for seconds in (60, 120, 240)
    ]
    assert all(
        "(a step takes 1.0 s as a rule); process 0 of 4 on host alpha " in line for line in said
    )
    assert all(line.endswith(" is waiting for the devices") for line in said)
    # A step ends it; the next hang is told anew.
    steps(watch, clock, [300.0])
    clock.now += 61
    watch.check()
    assert said[-1].startswith("no step has ended for 61 s")


def test_a_slow_model_may_take_ten_of_its_own_steps(watch, clock, said) -> None:
    steps(watch, clock, [300.0, *[30.0] * 6])
    clock.now += 299
    watch.check()
    assert said == []
    clock.now += 2
    watch.check()
    assert len(said) == 1


def test_before_there_are_steps_compiling_has_its_time(watch, clock, said) -> None:
    clock.now += 899
    watch.check()
    assert said == []
    clock.now += 2
    watch.check()
    (line,) = said
    assert line.endswith("is starting")


def test_what_a_process_does_is_said(watch, clock, said) -> None:
    steps(watch, clock, [60.0, *[1.0] * 6])
    with watch.doing("reading the batch of step 8"):
        clock.now += 100
        watch.check()
    assert said[-1].endswith("is reading the batch of step 8")
    watch.heartbeat()
    watch.check()
    assert len(said) == 1


def test_the_thread_checks_and_ends(said) -> None:
    with Watchdog(said.append, ["alpha"]):
        pass
    assert said == []
