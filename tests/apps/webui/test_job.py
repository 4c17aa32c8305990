"""Jobs of the app: told in order, stopped within one forward, one at a time, bounded."""

import threading
import time
from typing import Any

import pytest
import torch

from genattn.apps.webui.verbs.job import QUEUED_MESSAGES, Job, Stopped, Update
from genattn.errors import GenAttnError


def test_updates_come_in_order_and_end_with_the_answer() -> None:
    def work(job: Job) -> dict[str, Any]:
        for i in range(20):
            job.tell("step", i + 1, 20, value=i)
        return {"answer": 42}

    found = list(Job(work, threading.Lock()).updates())
    assert [u.values["value"] for u in found if "value" in u.values] == list(range(20))
    assert found[-1].last
    assert found[-1].values == {"answer": 42}
    assert "20 of 20" in found[-2].text()
    assert found[-1].text().startswith("**done**")


def test_errors_reach_the_one_who_listens() -> None:
    def work(job: Job) -> dict[str, Any]:
        raise GenAttnError("no such head")

    lock = threading.Lock()
    with pytest.raises(GenAttnError, match="no such head"):
        list(Job(work, lock).updates())
    assert not lock.locked()


def test_closing_stops_within_one_forward() -> None:
    model, calls, lock = torch.nn.Linear(2, 2), [], threading.Lock()

    def work(job: Job) -> dict[str, Any]:
        with job.watching(model):
            job.tell("begun")
            for _ in range(10_000):
                model(torch.zeros(1, 2))
                calls.append(1)
                time.sleep(0.01)
        return {}

    job = Job(work, lock)
    updates = job.updates()
    assert next(updates).stage == "begun"
    while not calls:
        time.sleep(0.01)
    updates.close()
    seen = len(calls)
    assert job.ended.wait(5)
    assert len(calls) <= seen + 1
    assert not lock.locked()
    assert not model._forward_pre_hooks, "the hook must be gone"


def test_a_slow_reader_slows_the_work() -> None:
    told = []

    def work(job: Job) -> dict[str, Any]:
        for i in range(50):
            job.tell("step", i)
            told.append(i)
        return {}

    updates = Job(work, threading.Lock()).updates()
    next(updates)
    time.sleep(0.3)
    assert len(told) <= QUEUED_MESSAGES + 2
    assert sum(u.total is None and not u.last for u in updates) >= 40
    assert told == list(range(50))


def test_waits_for_the_run_before_with_a_heartbeat() -> None:
    lock = threading.Lock()
    lock.acquire()
    updates = Job(lambda job: {"late": True}, lock).updates()
    assert next(updates).stage == "waiting for the run before"
    lock.release()
    assert list(updates)[-1].values == {"late": True}


def test_a_stop_while_waiting_does_no_work() -> None:
    lock, done = threading.Lock(), []
    lock.acquire()
    job = Job(lambda job: done.append(1) or {}, lock)
    updates = job.updates()
    next(updates)
    updates.close()
    lock.release()
    assert job.ended.wait(5)
    assert not done


def test_finishing_leaves_the_end_to_the_callback() -> None:
    ended_well, stop = [], threading.Event()

    def work(job: Job) -> dict[str, Any]:
        with job.finishing():
            job.on_stop.append(stop.set)
            job.tell("running")
            assert stop.wait(5)
            for _ in range(3 * QUEUED_MESSAGES):
                job.tell("nobody hears this, and nothing raises")
            job.check()
        ended_well.append(1)
        return {}

    job = Job(work, threading.Lock())
    updates = job.updates()
    next(updates)
    updates.close()
    assert job.ended.wait(5)
    assert ended_well


def test_check_raises_once_asked() -> None:
    job = Job(lambda job: {}, threading.Lock())
    job.check()
    job.stop()
    with pytest.raises(Stopped):
        job.check()
    with pytest.raises(Stopped):
        job.tell("anything")


def test_the_step_callback_tells_the_step() -> None:
    def work(job: Job) -> dict[str, Any]:
        after = job.on_step("guided", 3)
        return after(None, 1, None, {"latents": 1})

    found = list(Job(work, threading.Lock()).updates())
    assert (found[0].stage, found[0].done, found[0].total) == ("guided", 2, 3)
    assert found[-1].values == {"latents": 1}
    assert Update("opening").text() == "opening · 0.0 s"
