"""Jobs give the same results here and in processes; what workers say is what this process would say."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
from dask.distributed import KilledWorker
from helpers.pool_tasks import logging_level

from pipeline.runtime import executor as executor_module
from pipeline.runtime.executor import Executor, _result, open_executor
from pipeline.runtime.logs import set_up_logging


@pytest.fixture(autouse=True)
def level_as_before() -> Iterator[None]:
    yield
    set_up_logging()


@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
def test_workers_log_at_the_level_of_this_process(level: int) -> None:
    set_up_logging(level)
    with open_executor("local", 1) as executor:
        ((_, get_result),) = executor.map(logging_level, ["pipeline"])
        assert get_result() == (level, os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))


@pytest.mark.parametrize(("seconds", "num_here"), [(0.1, 20), (0.85, 20), (0.95, 2), (9.0, 1)])
def test_processes_start_when_that_saves_time(seconds: float, num_here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two processes, half of the time of the jobs that are left is saved, and the start takes 8 seconds."""
    now, there = [0.0], list[int]()

    @contextmanager
    def start(*_: object) -> Iterator[Executor]:
        def run(task: object, jobs: Sequence[int]) -> Iterator[tuple[int, Callable[[], int]]]:
            there.extend(jobs)
            return ((at, lambda job=job: -job) for at, job in enumerate(jobs))

        yield Executor(cast(Any, run), 2, False)

    def square(job: int) -> int:
        now[0] += seconds
        return job * job

    monkeypatch.setattr(executor_module.time, "process_time", lambda: now[0])
    with open_executor("local", 2, starts_late=True) as executor:
        monkeypatch.setattr(executor_module, "open_executor", start)
        found = [(at, get_result()) for at, get_result in executor.map(square, list(range(20)))]
        expected = [(at, at * at if at < num_here else -at) for at in range(20)]
        assert found == expected
        assert there == list(range(num_here, 20))
        again = [get_result() for _, get_result in executor.map(square, [5])]
        assert again == ([25] if num_here == 20 else [-5])  # what is started goes on


class Lost:
    """A future whose worker died four times."""

    status = "error"

    def result(self) -> None:
        raise KilledWorker("job-0", None, 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "4 workers died of it: is memory short?"),
        (
            "shard 3",
            "4 workers died of shard 3: is a file damaged there, or memory short? "
            "with fewer of them the same command goes on from here",
        ),
    ],
)
def test_workers_that_died_are_named(name: str, message: str) -> None:
    get_result = _result(Lost(), name)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="workers died") as raised:
        get_result()
    assert str(raised.value) == message
