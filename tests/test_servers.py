"""Private servers, for real: kill -9 and restart, credentials, strangers, and processes that are not ours."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from mlops_lib.servers import SERVICES, NotHealthy, Server, ServerError, check_http, find_program, server

NATIVE = [name for name, service in SERVICES.items() if service.launch]


def need(name: str) -> None:
    if find_program(SERVICES[name].program):
        return
    if os.environ.get("MLOPS_REQUIRE_STACK") == "1":
        pytest.fail(f"{name} is not installed: {SERVICES[name].install}")
    pytest.skip(f"not run: {name} is not installed")


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
