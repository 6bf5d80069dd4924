"""A bus over each transport, on a namespace of its own that is gone after the test."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.schema import DataIngested, Event

SCHEMES = ["memory", "sqlite"]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def address(scheme: str, tmp_path: Path) -> Iterator[tuple[str, dict]]:
    "Where the broker is, and options that keep one test apart from the others."
    name = f"t{uuid.uuid4().hex[:10]}"
    if scheme == "memory":
        yield f"memory://{name}", {}
    elif scheme == "sqlite":
        yield f"sqlite:///{tmp_path}/bus.db", {"lease": 2.0}


@pytest.fixture
def make_bus(address: tuple[str, dict], tmp_path: Path) -> Iterator[Callable[..., Bus]]:
    "Opens as many buses on the same broker as a test wants, as if by several services of one machine."
    url, options = address
    opened = contextlib.ExitStack()

    def make(**more: object) -> Bus:
        if not url.startswith(("memory", "sqlite")):
            more = {"ledger": tmp_path / "ledger.db", **more}
        bus = connect(url, **(options | more))
        opened.callback(bus.close, 10)
        return bus

    with opened:
        yield make


@pytest.fixture
def bus(make_bus: Callable[..., Bus]) -> Bus:
    return make_bus()


@pytest.fixture
def event() -> Callable[..., Event]:
    return an_event


def an_event(number: int = 0, story: str | None = None) -> DataIngested:
    more = {"correlation_id": story} if story else {}
    payload = {"dataset_id": f"d{number}", "dataset_path": "d.parquet", "num_samples": number}
    return DataIngested(source_service="test", payload=payload, **more)
