"""mlops stack, natively on real servers of its own, and docker-compose.yml against settings.ini."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from support import need

from mlops_lib.servers import SERVICES, find_program, free_port, server
from mlops_lib.settings import SettingsError, load_settings
from mlops_lib.stack import Stack, address, addresses, docker_answers

ROOT = Path(__file__).parents[1]


def workspace(root: Path, **stack: object) -> Stack:
    root.mkdir(parents=True, exist_ok=True)
    lines = ["[embedded]", "[stack]", *(f"{k} = {v}" for k, v in stack.items())]
    (root / "settings.ini").write_text("\n".join(lines) + "\n")
    return Stack(root, environ={})


def command(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLOPS_")}
    tool = Path(sys.executable).parent / "mlops"
    return subprocess.run([tool, "stack", *args], cwd=root, env=environ, capture_output=True, text=True)


def test_the_commands_from_up_to_down(tmp_path: Path) -> None:
    need("redis")
    url = f"redis://127.0.0.1:{free_port()}/0"
    stack = workspace(tmp_path, redis_url=url, bus_url=url)
    try:
        assert command(tmp_path, "status").returncode == 1, "nothing is up"
        up = command(tmp_path, "up", "redis", "--native")
        assert (up.returncode, "started" in up.stdout) == (0, True), up.stdout + up.stderr
        pid = stack.server("redis").record["pid"]
        assert command(tmp_path, "up", "redis", "--native").returncode == 0
        assert stack.server("redis").record["pid"] == pid, "up is a no-op for what is up"
        told = json.loads(command(tmp_path, "status", "--json").stdout)
        assert told["healthy"] is True
        assert {s["name"]: s["how"] for s in told["servers"]}["redis"] == "started"
        assert "Ready to accept connections" in command(tmp_path, "logs", "redis").stdout
        assert addresses(tmp_path, environ={}) == {"redis": url}

        stack.server("redis").kill()
        crashed = command(tmp_path, "status")
        assert crashed.returncode == 1
        assert re.search(r"redis +crashed", crashed.stdout)
        assert command(tmp_path, "up", "redis", "--native").returncode == 0
        assert stack.server("redis").url == url
    finally:
        down = command(tmp_path, "down")
    assert re.search(r"redis +ended", down.stdout)
    assert down.returncode == 0
    assert command(tmp_path, "down").stdout == ""


@pytest.mark.parametrize("args", [("up", "mysql"), ("logs",), ("status", "redis")])
def test_asking_wrongly_is_exit_code_2(tmp_path: Path, args: tuple[str, ...]) -> None:
    workspace(tmp_path)
    assert command(tmp_path, *args).returncode == 2


def test_mlflow_comes_up_on_a_postgres_and_goes_down_with_it(tmp_path: Path) -> None:
    need("postgres")
    from mlflow import MlflowClient

    database = f"postgresql://app:s3cret@127.0.0.1:{free_port()}/tracking"
    stack = workspace(tmp_path, database_url=database, mlflow_tracking_uri=f"http://127.0.0.1:{free_port()}")
    try:
        states = {s.name: s for s in stack.up(["mlflow"], native=True)}
        assert {n: s.how for n, s in states.items()} == {"postgres": "started", "mlflow": "started"}, states
        client = MlflowClient(stack.load().mlflow_tracking_uri)
        run = client.create_run(client.create_experiment("inbox"))
        client.log_text(run.info.run_id, "on its way", "answer.txt")
        assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["answer.txt"]
        assert list((tmp_path / "data/stack/mlflow/data/artifacts").rglob("answer.txt")), "artifacts are served"
        process = stack.server("mlflow").process
        assert process is not None
        assert "s3cret" not in " ".join(process.cmdline())
    finally:
        ended = stack.down(["postgres"])
    assert [s.name for s in ended] == ["mlflow", "postgres"], "what needs a server is ended before it"


def test_one_failure_leaves_the_rest_up_and_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("redis")
    monkeypatch.setattr("mlops_lib.servers.find_program", lambda name: None if name == "postgres" else find_program(name))
    at = "127.0.0.1"
    stack = workspace(
        tmp_path,
        redis_url=f"redis://{at}:{free_port()}/0",
        database_url=f"postgresql://a:b@{at}:{free_port()}/c",
        mlflow_tracking_uri=f"http://{at}:{free_port()}",
        grafana_url=f"http://{at}:{free_port()}",
    )
    try:
        states = {s.name: s for s in stack.up(native=True)}
        assert {n: s.how for n, s in states.items() if s.healthy} == {"redis": "started"}
        assert states["postgres"].how == states["mlflow"].how == "failed"
        assert "apt-get install -y postgresql" in states["postgres"].detail
        assert "postgres" in states["mlflow"].detail
        assert states["grafana"].how == "compose only"
        assert states["grafana"].healthy is None
        assert states["rabbitmq"].how == "not used"
    finally:
        stack.down()


def test_two_commands_at_once_start_one_server(tmp_path: Path) -> None:
    need("redis")
    stack = workspace(tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    try:
        with ThreadPoolExecutor(4) as pool:
            both = list(pool.map(lambda _: Stack(tmp_path, environ={}).up(["redis"], native=True), range(4)))
        assert [[s.how for s in states] for states in both] == [["started"]] * 4
        with pytest.raises(ValueError, match="nosuch"):
            stack.up(["nosuch"])
    finally:
        assert len(stack.down()) == 1


def test_chroma_moves_aside_and_its_settings_follow(tmp_path: Path) -> None:
    need("chroma")
    with server("redis", tmp_path / "stranger") as stranger:
        stack = workspace(tmp_path / "w", chroma_host="127.0.0.1", chroma_port=stranger.port)
        try:
            (state,) = stack.up(["chroma"], native=True)
            assert state.how == "started", state
            assert stack.load().chroma_port != stranger.port
            assert address("chroma", stack.load()) == state.url
            environ = {"CHROMA_PORT": "7"}
            assert load_settings("stack", tmp_path / "w", environ).chroma_port == 7, "pointed elsewhere, it stays"
        finally:
            stack.down()
    assert stack.load().chroma_port == stranger.port


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    stack = workspace(tmp_path)
    note = stack.folder / "redis" / "server.json"
    note.parent.mkdir(parents=True)
    note.write_text('{"moved": {"redis_url"')
    with pytest.raises(SettingsError, match=re.escape(str(note))):
        load_settings("stack", tmp_path, environ={})


def test_without_docker_there_is_no_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert docker_answers() is False


def test_compose_and_settings_and_services_agree() -> None:
    file = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    settings = load_settings("stack", ROOT, environ={"MLOPS_DATA_DIR": "/nonexistent"})
    assert set(file["services"]) == set(SERVICES)
    for name, c in file["services"].items():
        assert "container_name" not in c, name
        assert re.search(r":v?\d+(\.\d+)+$", c["image"]), f"{name}: pin the version of {c['image']}"
        assert c["healthcheck"]["test"], name
        assert c.get("restart") == "unless-stopped", name
        (port,) = c["ports"]
        host, outside, _ = port.split(":")
        assert (host, f":{outside}" in (address(name, settings) or "")) == ("127.0.0.1", True), f"{name}: {port}"
        assert set(c.get("depends_on", {})) == set(SERVICES[name].needs)
        assert all(d == {"condition": "service_healthy"} for d in c.get("depends_on", {}).values())
        mounted = [v.split(":")[0] for v in c["volumes"]]
        assert any(v in file["volumes"] for v in mounted), f"{name} keeps its data in no named volume"
        assert all((ROOT / v).exists() for v in mounted if v.startswith(".")), mounted


def test_the_command_line_knows_every_server() -> None:
    from mlops_lib.cli import SERVER

    assert list(SERVER.choices) == list(SERVICES)


def test_compose_has_the_credentials_and_versions_of_the_workspace() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    services = yaml.safe_load(text)["services"]
    settings = load_settings("stack", ROOT, environ={"MLOPS_DATA_DIR": "/nonexistent"})
    plain = lambda value: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value)
    postgres = {k: plain(v) for k, v in services["postgres"]["environment"].items()}
    wanted = "postgresql://{POSTGRES_USER}:{POSTGRES_PASSWORD}@127.0.0.1:5432/{POSTGRES_DB}".format(**postgres)
    assert settings.database_url == wanted
    rabbit = {k: plain(v) for k, v in services["rabbitmq"]["environment"].items()}
    wanted = "amqp://{RABBITMQ_DEFAULT_USER}:{RABBITMQ_DEFAULT_PASS}@127.0.0.1:5672/".format(**rabbit)
    assert settings.rabbitmq_url == settings.bus_url == wanted
    mlflow = services["mlflow"]["environment"]
    assert plain(mlflow["MLFLOW_BACKEND_STORE_URI"]) == settings.database_url.replace("127.0.0.1", "postgres")
    assert "127.0.0.1" in mlflow["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert mlflow["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert services["chroma"]["environment"]["ANONYMIZED_TELEMETRY"] == "False"
    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert services["chroma"]["image"].endswith(f":{locked['chromadb']}")
    assert services["mlflow"]["image"].endswith(f":{locked['mlflow']}")
