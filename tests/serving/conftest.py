"What the tests of several services share."

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlops_lib.events.bus import Bus
from mlops_lib.events.history import History


@pytest.fixture
def history(bus: Bus, tmp_path: Path) -> Iterator[History]:
    "All that happens on a test file's own `bus`."
    one = History(f"sqlite:///{tmp_path}/history.db")
    one.follow(bus)
    yield one
    one.close()
