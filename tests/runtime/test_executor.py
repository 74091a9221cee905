"""Jobs give the same results here and in processes; what workers say is what this process would say."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from dask.distributed import KilledWorker
from helpers.pool_tasks import logging_level

from pipeline.runtime.executor import _result, open_executor
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
