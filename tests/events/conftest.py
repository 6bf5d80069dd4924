"""A bus over each transport, on a namespace of its own that is gone after the test."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import an_event, private

from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.schema import Event
from mlops_lib.servers import Server

SCHEMES = ["memory", "sqlite", "redis", "amqp", "kafka"]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("redis", tmp_path_factory.mktemp("redis")) as one:
        yield one


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with private("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as one:
        yield one


@pytest.fixture(scope="session")
def kafka_cluster() -> Iterator[Any]:
    "Kafka's own C client holds a cluster of one broker, so that nothing needs to be installed."
    from mlops_lib.events.kafka import LocalCluster

    with LocalCluster() as one:
        yield one


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def address(scheme: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, dict]]:
    "Where the broker is, and options that keep one test apart from the others."
    name = f"t{uuid.uuid4().hex[:10]}"
    if scheme == "memory":
        yield f"memory://{name}", {}
    elif scheme == "sqlite":
        yield f"sqlite:///{tmp_path}/bus.db", {"lease": 2.0}
    elif scheme == "redis":
        yield request.getfixturevalue("redis_server").url, {"namespace": name, "lease": 2.0}
    elif scheme == "amqp":
        yield request.getfixturevalue("rabbitmq_server").url, {"namespace": name}
    elif scheme == "kafka":  # this cluster's fetches do not notice what arrives while they wait
        quick = {"join": 2.0, "reorder": 0.05, "conf": {"fetch.wait.max.ms": 10}}
        yield request.getfixturevalue("kafka_cluster").url, {"namespace": name, **quick}


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
