"""Private servers, for real: kill -9 and restart, credentials, strangers, and processes that are not ours."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support import need

from mlops_lib.servers import (
    SERVICES,
    Hung,
    NotHealthy,
    Server,
    ServerError,
    _wait_gone,
    check_http,
    free_port,
    server,
)

NATIVE = [name for name, service in SERVICES.items() if service.launch]


@pytest.mark.parametrize("name", [n for n in NATIVE if n != "mlflow"])  # test_stack.py starts MLflow
def test_killed_it_comes_back_at_the_same_address_and_ended_it_leaves_nothing(name: str, tmp_path: Path) -> None:
    need(name)
    with server(name, tmp_path) as one:
        url, family = one.url, one._family()
        one.kill()
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert one.ask() is not None
        assert one.process is None
        assert one.start().url == url
        family = one._family()
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert one.record == {}


def test_rabbitmq_keeps_confirmed_messages_and_orphans_are_ended(tmp_path: Path) -> None:
    need("rabbitmq")
    import pika

    persistent = pika.BasicProperties(delivery_mode=2)
    with server("rabbitmq", tmp_path) as one:
        with pika.BlockingConnection(pika.URLParameters(one.url)) as line:
            channel = line.channel()
            channel.queue_declare("inbox", durable=True)
            channel.confirm_delivery()
            for i in range(50):
                channel.basic_publish("", "inbox", str(i).encode(), persistent)
        assert one.process is not None
        machine = [p for p in one._family() if p.name() == "beam.smp"]
        one.process.kill()  # only the script: the Erlang machine lives on and holds the port
        deadline = time.monotonic() + 30
        while one.process and time.monotonic() < deadline:
            time.sleep(0.02)
        assert machine[0].is_running()
        one.start()
        assert not machine[0].is_running() or machine[0].status() == psutil.STATUS_ZOMBIE
        with pika.BlockingConnection(pika.URLParameters(one.url)) as line:
            assert line.channel().queue_declare("inbox", passive=True).method.message_count == 50


def test_postgres_keeps_what_was_committed_and_refuses_a_wrong_password(tmp_path: Path) -> None:
    need("postgres")
    import psycopg

    with server("postgres", tmp_path) as one:
        with psycopg.connect(one.url) as db:
            db.execute("CREATE TABLE message (id int)")
            db.execute("INSERT INTO message VALUES (1)")
        one.kill()
        one.start()
        with psycopg.connect(one.url) as db:
            assert db.execute("SELECT id FROM message").fetchone() == (1,)
        with pytest.raises(NotHealthy, match="password"):
            one.service.check(one.url.replace(":postgres@", ":wrong@"))


def test_redis_with_a_password_is_healthy_only_with_it(tmp_path: Path) -> None:
    need("redis")
    url = Server("redis", tmp_path).url
    with server("redis", tmp_path, url=url.replace("127.0.0.1", ":s3cret%20%22quoted%22@127.0.0.1")) as one:
        with pytest.raises(NotHealthy):
            one.service.check(url)
        arguments = " ".join(one.process.cmdline()) if one.process else ""
        assert "s3cret" not in arguments, "every user of the machine can read a command line"
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0


def test_a_process_that_has_the_noted_id_by_chance_is_never_ended(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        one = Server("redis", tmp_path)
        one.note("started", pid=bystander.pid, started=psutil.Process(bystander.pid).create_time() - 60)
        assert one.process is None
        one.kill()
        one.stop()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_an_adopted_server_is_not_ended(tmp_path: Path) -> None:
    need("redis")
    with server("redis", tmp_path / "owner") as owner:
        other = Server("redis", tmp_path / "other", url=owner.url)
        other.note("adopted")
        other.stop()
        assert owner.ask() is None


def test_a_second_server_on_a_port_fails_even_though_somebody_healthy_answers_there(tmp_path: Path) -> None:
    need("redis")
    with server("redis", tmp_path / "one") as one, pytest.raises(ServerError, match="in use"):
        Server("redis", tmp_path / "two", url=one.url).start()


def test_a_port_that_is_open_and_silent_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for service in SERVICES.values():
            with pytest.raises(NotHealthy):
                service.check(service.url.format(port=port))


def test_a_web_page_that_says_something_else_is_not_healthy(tmp_path: Path) -> None:
    need("prometheus")
    with server("prometheus", tmp_path) as one, pytest.raises(NotHealthy, match="not as expected"):
        check_http("/-/healthy", "I am Grafana")(one.url)


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("redis")
    monkeypatch.setattr("mlops_lib.servers.PATIENCE_TO_END", 0.5)
    one = Server("redis", tmp_path).start()
    assert one.process is not None
    process = one.process
    process.send_signal(signal.SIGSTOP)  # it cannot hear SIGTERM
    one.stop()
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_wrong_names_and_missing_programs_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Servers: redis, rabbitmq"):
        Server("mysql", tmp_path)
    with pytest.raises(ServerError, match="Docker Compose"):
        Server("grafana", tmp_path).start()
    monkeypatch.setattr("mlops_lib.servers.PLACES", [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match="apt-get install -y redis-server"):
        Server("redis", tmp_path / "r").start()


def test_a_free_port_is_none_that_an_outgoing_connection_is_given() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(given.read_text().split()[0]) if given.exists() else 49_152
    ports = {free_port() for _ in range(50)}
    assert max(ports) < first


def test_rabbitmq_is_up_when_it_says_so_not_when_it_first_answers(tmp_path: Path) -> None:
    need("rabbitmq")
    with server("rabbitmq", tmp_path) as one:  # it answers some steps earlier; queues declared until then can be lost
        assert one.log.read_text().count("Server startup complete") == 1
        one.kill()
        assert one.start().log.read_text().count("Server startup complete") == 2


def test_a_port_is_given_once_for_all_processes_that_still_live() -> None:
    ours = {free_port() for _ in range(300)}
    assert len(ours) == 300
    ask = "from mlops_lib.servers import free_port; print(*(free_port() for _ in range(1_000)))"
    theirs = {int(port) for port in subprocess.check_output([sys.executable, "-c", ask], text=True).split()}
    assert len(theirs) == 1_000
    assert not ours & theirs


@pytest.mark.skipif(sys.platform != "linux", reason="ends one thread of a process by Linux's own call")
def test_a_process_has_ended_when_its_last_thread_has() -> None:
    number = {"x86_64": 60, "aarch64": 93}[os.uname().machine]  # exit(2), of a single thread
    code = f"import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); ctypes.CDLL(None).syscall({number}, 0)"
    child = psutil.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _wait_gone([psutil.Process(child.pid)], 0.2), "a thread of it lives, and would still hold its port"
    finally:
        child.kill()
    assert _wait_gone([psutil.Process(child.pid)], 10)


def test_a_server_that_hangs_at_its_start_is_started_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    need("redis")
    plain = SERVICES["redis"]

    def lame(one: Server) -> tuple[list[str], dict[str, str]]:
        starts.append(one)
        return (["sleep", "1000"], {}) if len(starts) <= hangs else plain.launch(one)  # type: ignore[misc]

    monkeypatch.setitem(SERVICES, "redis", replace(plain, launch=lame, patience=3))
    starts, hangs = [], 1
    with caplog.at_level("WARNING"), server("redis", tmp_path / "once") as one:
        assert one.ask() is None
        assert len(starts) == 2
    assert "Started once more" in caplog.text
    starts, hangs = [], 2
    with pytest.raises(Hung, match=r"redis is not healthy \(.*sleep.*\n\(nothing\)"), server("redis", tmp_path / "twice"):
        pytest.fail("it is not healthy")
    assert len(starts) == 2
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"] and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, "what hung is ended"
