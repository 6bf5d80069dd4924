"""The workspace as a student meets it: `mlops lab` in a real browser, from the map through a lesson to a solved exercise."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from support import until

from mlops_lib.course import kernels
from mlops_lib.servers import free_port

ROOT = Path(__file__).parents[2]
EXERCISE = "0_start/01_logs"
PATIENCE = 180_000  # milliseconds; on a quiet machine each wait is a second or two
expect.set_options(timeout=PATIENCE)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    "A copy of the workspace, open in JupyterLab; the address of its first page."
    workspace, own = tmp_path / "workspace", tmp_path / "own"
    for name in ("notebooks", "exercises"):
        shutil.copytree(ROOT / name, workspace / name)
    shutil.copy(ROOT / "settings.ini", workspace)
    sockets = Path("/tmp") / f"lab-{secrets.token_hex(4)}"  # paths of sockets have to be short
    sockets.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets))
    whole = own / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    whole.parent.mkdir(parents=True)
    whole.write_text(json.dumps({"windowingMode": "none"}))  # every cell is on the page, also what is out of sight
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config"}
    places |= {"JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLOPS_")}
    environ |= {name: str(own / place) for name, place in places.items()} | {"JUPYTER_TOKEN": secrets.token_hex(16)}
    port, log = free_port(), tmp_path / "lab.log"
    command = [str(Path(sys.executable).parent / "mlops"), "lab", "--no-browser", "--port", str(port), "--ServerApp.port_retries=0"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=workspace, env=environ, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(URLError, ConnectionError, TimeoutError):
            return urllib.request.urlopen(f"{url}/api", timeout=5).status == 200
        return False

    try:
        until(answers, "JupyterLab answers", log)
        yield f"{url}/?token={environ['JUPYTER_TOKEN']}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        kernels.stop_servers()
        shutil.rmtree(sockets, ignore_errors=True)


def shown(page: Page) -> Locator:
    "The notebook of the tab that is in front."
    return page.locator(".jp-NotebookPanel:visible")


def run_all(page: Page) -> None:
    "As a person does: wait until the bar below says that the kernel is idle, then use the menu."
    expect(page.locator("#jp-main-statusbar").get_by_text("| Idle")).to_be_visible()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def tab(page: Page, name: str) -> Locator:
    return page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab.lm-mod-current", has_text=name)


def test_from_the_map_through_a_lesson_to_a_solved_exercise(lab: str, browser: Browser) -> None:
    page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(lab)
    expect(shown(page).get_by_role("heading", name="MLOps Workshop")).to_be_visible()
    expect(shown(page).locator(".jp-RenderedMermaid img, .jp-RenderedMermaid svg").first).to_be_visible()

    shown(page).get_by_role("link", name="01 Logs").click()
    expect(tab(page, "01_logs.ipynb")).to_be_visible()
    expect(shown(page).get_by_role("heading", name="Logs", exact=True)).to_be_visible()
    run_all(page)
    expect(shown(page).get_by_text("'log records read back':")).to_be_visible()

    page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab", has_text="index.ipynb").click()
    shown(page).locator(f'a[href*="exercises/{EXERCISE}.ipynb"]').click()
    expect(shown(page).get_by_role("heading", name="Exercise · Logs")).to_be_visible()
    run_all(page)
    unsolved = shown(page).get_by_text("NotImplementedError: Not solved yet").first
    expect(unsolved).to_be_visible()

    cells = json.loads((ROOT / "solutions" / f"{EXERCISE}.ipynb").read_text())["cells"]
    solved = ["".join(c["source"]) for c in cells if c["metadata"]["nbgrader"]["solution"]]
    for source in solved:
        shown(page).locator(".jp-CodeCell .cm-content", has_text="Not solved yet").first.click()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(source)
    expect(shown(page).locator(".jp-CodeCell .cm-content", has_text="Not solved yet")).to_have_count(0)
    run_all(page)
    last = shown(page).locator(".jp-CodeCell").last
    expect(last.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"))
    expect(unsolved).to_be_hidden()
    expect(last.locator('[data-mime-type="application/vnd.jupyter.stderr"]')).to_have_count(0)  # an error ends the run, so the others are well
