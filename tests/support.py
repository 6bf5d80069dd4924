"""What tests share: servers of their own, and whether they are to be done at length."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from mlops_lib.events.schema import DataIngested
from mlops_lib.servers import SERVICES, Server, find_program, server

LONG = os.environ.get("MLOPS_LONG") == "1"  # `make test-all`
T = TypeVar("T")


def short(
    few: T,  # in `make test`
    all_: T,  # in `make test-all`
) -> T:
    "How much of a long test is done."
    return all_ if LONG else few


def not_run(why: str) -> NoReturn:
    "Skip a test whose parts are missing; where MLOPS_REQUIRE_STACK=1, they must not be."
    if os.environ.get("MLOPS_REQUIRE_STACK") == "1":
        pytest.fail(why)
    pytest.skip(why)


def need(name: str) -> None:
    "The test wants a server's program."
    if not find_program(SERVICES[name].program):
        not_run(f"not run: {SERVICES[name].program} is not installed ({SERVICES[name].install})")


def private(name: str, folder: Path, url: str | None = None) -> contextlib.AbstractContextManager[Server]:
    "A server of the test's own."
    need(name)
    return server(name, folder, url)


def until(condition: Callable[[], Any], what: str, *logs: Path, seconds: float = 600) -> Any:
    "Wait for what has to come; returns it, or fails with what the logs say."
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            told = "\n".join(f"{log.name}: {log.read_text()[-3_000:]}" for log in logs if log.exists())
            pytest.fail(f"Not within {seconds:g} s: {what}\n{told}")
        time.sleep(0.02)
    return found


def an_event(number: int = 0, story: str | None = None) -> DataIngested:
    more = {"correlation_id": story} if story else {}
    payload = {"dataset_id": f"d{number}", "dataset_path": "d.parquet", "num_samples": number}
    return DataIngested(source_service="test", payload=payload, **more)
