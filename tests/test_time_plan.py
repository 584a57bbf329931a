"""Trainings with a limit of minutes, on a clock that the tests set: no test waits."""

import math
import time
from types import SimpleNamespace

import pytest

from fpnssd.training import distributed
from fpnssd.training.config import TrainConfig
from fpnssd.training.optim import lr_factor
from fpnssd.training.time_plan import TimePlan, process_start
from train import Trainer


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def simulate(minutes, seconds_of_step, num_steps=10**6, start_up=8.0, end=9.0, stride=1, used=0.0, step=0):
    """Runs a plan to its end; returns (seconds taken, learning rate factors, plan).

    Args:
        seconds_of_step: of a step, a function of the seconds since the start.
        end: seconds of the evaluation and the files after the last step, when a step takes 2 s.
    """
    clock = Clock()
    plan = TimePlan(num_steps, 16, minutes, used, clock(), end_images=70, stride=stride, clock=clock)
    clock.now += start_up
    plan.begin(step)
    config, factors = TrainConfig(warmup_steps=50), []
    while True:
        factors.append(lr_factor(step, config, plan.schedule_steps(step)))
        clock.now += seconds_of_step(clock.now - 1000)
        step += 1
        plan_done = plan.done
        plan.advance(step)
        if step % stride:
            plan.done = plan_done  # several processes take the main one's at a log only
        if step == num_steps or plan.out_of_time:
            break
    clock.now += end * seconds_of_step(clock.now - 1000) / 2
    return clock.now - 1000, factors, plan


@pytest.mark.parametrize("minutes", [3, 10, 20, 60])
def test_a_steady_machine_uses_the_time_it_was_given(minutes):
    taken, factors, _ = simulate(minutes, lambda now: 2.0)
    assert 0.93 * 60 * minutes <= taken <= 1.02 * 60 * minutes
    assert max(factors) > 0.9
    assert factors[-1] < 0.01
    assert factors[-1] == min(factors[len(factors) // 4 :])


@pytest.mark.parametrize("slower", [2, 4])
@pytest.mark.parametrize("minutes", [3, 10, 20])
def test_a_machine_that_becomes_busy_half_way(minutes, slower):
    """At most a tenth over, though steps and evaluation take 2 or 4 times as long, and the rate still reaches zero."""
    taken, factors, _ = simulate(minutes, lambda now: 2.0 if now < 30 * minutes else 2.0 * slower)
    assert 0.85 * 60 * minutes <= taken <= 1.1 * 60 * minutes
    assert factors[-1] < 0.03


def test_a_machine_that_becomes_free_half_way_takes_more_steps():
    slow = len(simulate(10, lambda now: 4.0)[1])
    freed = len(simulate(10, lambda now: 4.0 if now < 300 else 2.0)[1])
    assert freed > 1.4 * slow


def test_the_rate_is_that_of_the_same_number_of_steps_without_a_limit():
    _, factors, _ = simulate(20, lambda now: 2.0, start_up=0.0)
    config = TrainConfig(warmup_steps=50)
    for step in range(len(factors) // 4, len(factors)):
        assert factors[step] == pytest.approx(lr_factor(step, config, len(factors)), abs=0.03)


def test_steps_end_a_training_that_is_faster_than_its_limit():
    taken, factors, plan = simulate(20, lambda now: 2.0, num_steps=100)
    assert len(factors) == 100
    assert plan.done == 1
    assert taken < 300
    config = TrainConfig(warmup_steps=50)
    assert factors[60:] == pytest.approx([lr_factor(step, config, 100) for step in range(60, 100)])


def test_without_a_limit_only_steps_count():
    clock = Clock()
    plan = TimePlan(100, 16, clock=clock)
    plan.begin(0)
    for step in range(1, 51):
        clock.now += 1e6
        plan.advance(step)
    assert plan.done == 0.5
    assert plan.schedule_steps(50) == 100
    assert not plan.out_of_time
    assert plan.seconds_left(50) >= 50e6
    plan.advance(100)
    assert not plan.out_of_time


def test_a_resume_keeps_to_what_is_left():
    taken, factors, _ = simulate(10, lambda now: 2.0, used=300.0, step=130)
    assert 0.85 * 300 <= taken <= 1.02 * 300
    length = 130 / (308 / 597)  # 308 s of the 597 for steps have passed
    assert factors[0] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * (130 - 50) / (length - 50)), abs=0.01)
    assert factors[-1] < 0.01
    taken, factors, _ = simulate(10, lambda now: 2.0, used=650.0, step=280)
    assert len(factors) == 1  # a single step, and then its end


def test_processes_that_agree_every_twenty_steps():
    taken, factors, _ = simulate(10, lambda now: 0.5, stride=20)
    assert 0.93 * 600 <= taken <= 1.02 * 600
    assert len(factors) % 20 == 0


def test_a_slow_first_step_is_no_measure_of_the_pace():
    """It compiles for 60 s; 5,000 images to evaluate would take 2,540 of its images' time, and 85 of the others'."""
    clock = Clock()
    plan = TimePlan(10**6, 32, 20, 0.0, clock(), end_images=5000, clock=clock)
    plan.begin(0)
    clock.now += 60
    assert plan.advance(1) == pytest.approx(60 / 1197)
    clock.now += 1
    assert plan.advance(2) == pytest.approx(61 / (1200 - 3 - 2540 / 32))
    clock.now += 100  # an evaluation
    plan.begin(2)
    clock.now += 1
    plan.advance(3)
    assert plan.step_seconds == 1


def test_an_evaluation_before_the_last_one_needs_time_for_both():
    clock = Clock()
    plan = TimePlan(10**6, 10, 10, 0.0, clock(), end_images=20, clock=clock)
    plan.begin(0)
    for step in (1, 2):
        clock.now += 1
        plan.advance(step)
    assert plan.end_seconds == 3 + 50 / 10
    clock.now = 1000 + 583
    assert plan.fits_evaluation()
    clock.now = 1000 + 585
    assert not plan.fits_evaluation()


def test_between_logs_several_processes_keep_what_they_agreed_on(monkeypatch):
    """Their clocks differ: each for itself would end at another step than the others."""
    clock, config = Clock(), TrainConfig(log_every=20)
    plan = TimePlan(10**6, 16, 1, 0.0, clock(), clock=clock)
    plan.begin(0)
    trainer = SimpleNamespace(
        state=SimpleNamespace(step=7), plan=plan, config=config, stop=SimpleNamespace(requested=False), stopping=False,
        progress=SimpleNamespace(begun_at=0), last_save=time.monotonic(),
    )  # fmt: skip
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    clock.now += 59
    assert not Trainer.log_save_or_stop(trainer, is_last=False)
    assert plan.done == 0
    assert not plan.out_of_time


def test_the_share_never_falls():
    clock = Clock()
    plan = TimePlan(10**6, 16, 5, 0.0, clock(), 70, clock=clock)
    plan.begin(0)
    shares = []
    for step in range(1, 60):
        clock.now += 9.0 if step == 20 else 2.0  # one step during which something else ran
        shares.append(plan.advance(step))
    assert shares == sorted(shares)


def test_what_is_printed():
    clock = Clock()
    plan = TimePlan(600, 16, end_images=20, clock=clock)
    plan.begin(0)
    for step in range(1, 6):
        clock.now += 2.0
        plan.advance(step)
    assert plan.format_estimate(5).startswith("about 20 min from here at 2.00 s for a step of 16 images")
    assert plan.format_total() == "/600"
    plan.limit = 600
    assert plan.format_estimate(5) == "about 295 steps in 10 min at 2.00 s for a step of 16 images"


def test_the_start_of_this_process_is_before_now():
    assert 0 < time.monotonic() - process_start() < 86400
