"""The watchdog reports slow steps and stalled runs, with the host to look at."""

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
def reports() -> list[str]:
    return []


@pytest.fixture
def watch(clock: Clock, reports: list[str]) -> Watchdog:
    return Watchdog(reports.append, HOSTS, 0, clock)


def steps(watch: Watchdog, clock: Clock, seconds: list[float], busy=(0.1, 0.1, 0.1, 0.1)) -> None:
    for number, duration in enumerate(seconds, 1):
        clock.now += duration
        watch.step(number, duration, busy)


def test_reports_a_step_of_ten_medians(watch, clock, reports) -> None:
    # The first step compiles; it is neither slow nor typical.
    steps(watch, clock, [120.0, 1.0, 1.1, 0.9, 1.0, 1.0, 9.9])
    assert reports == []
    steps(watch, clock, [10.1])
    (line,) = reports
    assert line.startswith("step 1 took 10.1 s, 10 times as long as usual: ")
    assert line.endswith("all 4 processes waited for the devices")


def test_names_the_process_whose_batch_the_others_waited_for(watch, clock, reports) -> None:
    steps(watch, clock, [60.0, *[1.0] * 6])
    steps(watch, clock, [20.0], busy=(0.1, 0.1, 19.7, 0.2))
    assert reports == [
        "step 1 took 20.0 s, 20 times as long as usual: process 2 of 4 on host gamma needed 19.7 s "
        "for its batch"
    ]


@pytest.mark.parametrize(
    ("busy", "cause"),
    [(19.7, "host alpha needed 19.7 s for its batch"), (0.1, "host alpha waited for the devices")],
)
def test_names_the_host_of_a_single_process(clock, reports, busy: float, cause: str) -> None:
    single = Watchdog(reports.append, ["alpha"], 0, clock)
    steps(single, clock, [60.0, *[1.0] * 6])
    steps(single, clock, [20.0], busy=(busy,))
    assert reports == [f"step 1 took 20.0 s, 20 times as long as usual: {cause}"]


def test_only_the_first_process_reports_slow_steps(clock, reports) -> None:
    steps(Watchdog(reports.append, HOSTS, 1, clock), clock, [1.0] * 7 + [50.0])
    assert reports == []


def test_needs_some_steps_to_know_the_usual_time(watch, clock, reports) -> None:
    steps(watch, clock, [60.0, 0.1, 0.1, 5.0])
    assert reports == []


def test_reports_a_stall_again_whenever_its_time_has_doubled(watch, clock, reports) -> None:
    steps(watch, clock, [60.0, *[1.0] * 6])
    for _ in range(60):
        clock.now += 5
        watch.check()
    assert [line.partition(" s ")[0] for line in reports] == [
        f"no step has ended for {seconds}" for seconds in (60, 120, 240)
    ]
    assert all(
        "(a step usually takes 1.0 s); process 0 of 4 on host alpha " in line for line in reports
    )
    assert all(line.endswith(" is waiting for the devices") for line in reports)
    # A step ends the stall; the next one is reported again.
    steps(watch, clock, [300.0])
    clock.now += 61
    watch.check()
    assert reports[-1].startswith("no step has ended for 61 s")


def test_slow_steps_raise_the_limit_of_a_stall(watch, clock, reports) -> None:
    steps(watch, clock, [300.0, *[30.0] * 6])
    clock.now += 299
    watch.check()
    assert reports == []
    clock.now += 2
    watch.check()
    assert len(reports) == 1


def test_allows_more_time_for_compilation(watch, clock, reports) -> None:
    clock.now += 899
    watch.check()
    assert reports == []
    clock.now += 2
    watch.check()
    (line,) = reports
    assert line.endswith("is starting")


def test_names_the_current_activity(watch, clock, reports) -> None:
    steps(watch, clock, [60.0, *[1.0] * 6])
    with watch.doing("reading the batch of step 8"):
        clock.now += 100
        watch.check()
    assert reports[-1].endswith("is reading the batch of step 8")
    watch.heartbeat()
    watch.check()
    assert len(reports) == 1


def test_thread_ends_with_the_block(reports) -> None:
    with Watchdog(reports.append, ["alpha"]):
        pass
    assert reports == []
