"""Making and proving exercises, several at a time."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlops_lib.course.exercises import release

ROOT = Path(__file__).parents[2]


def test_exercises_can_be_released_side_by_side(tmp_path: Path) -> None:
    source = ROOT / "solutions" / "0_start" / "00_settings.ipynb"
    copies = [tmp_path / str(i) / "0_start" / source.name for i in range(8)]  # its own name stands in an exercise
    for copy in copies:
        copy.parent.mkdir(parents=True)
        shutil.copy(source, copy)
    before = Path.cwd()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda path: release(path, tmp_path / "out" / path.relative_to(tmp_path)), copies))
    assert len({path.read_text() for path in made}) == 1
    assert "BEGIN SOLUTION" not in json.dumps(json.loads(made[0].read_text()))
    assert Path.cwd() == before
