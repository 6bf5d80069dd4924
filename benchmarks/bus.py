"""The event bus beside the raw client of each broker, in turns, in one run: what do its promises cost?

python benchmarks/bus.py                 # every broker that is installed here, each a private server
python benchmarks/bus.py sqlite parse    # some of: sqlite, delivery, rabbitmq, redis, parse, import
python benchmarks/bus.py --anchors       # also FastStream and kombu, where they are installed
"""

import argparse
import asyncio
import importlib.util
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable
from functools import reduce
from operator import or_
from pathlib import Path

from pydantic import TypeAdapter

from mlops_lib.events import sqlite as file_queue
from mlops_lib.events.bus import Bus, connect
from mlops_lib.events.schema import DataIngested, Event, parse_event
from mlops_lib.servers import ServerError, server

EVENTS, ROUNDS = 10_000, 5
Side = Callable[[], float]  # one round; returns events a second


def an_event(number: int) -> DataIngested:
    "An event of about 485 bytes."
    features = ["text_length", "word_count", "hour_of_day", "day_of_week", "category_encoded", "user_mean_stars"]
    payload = {"dataset_id": f"inbox-{number}", "dataset_path": f"data/primary/inbox-{number}.parquet"}
    return DataIngested(source_service="ingress", payload=payload | {"num_samples": number, "features": features})


def in_turns(sides: dict[str, Side], rounds: int = ROUNDS) -> dict[str, float]:
    "The median of each side; every round runs all of them, so that a busy moment hits all."
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            speeds[name].append(side())
    return {name: statistics.median(values) for name, values in speeds.items()}


def rate(work: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def table(title: str, speeds: dict[str, float], mark: float | None = None, ours: str = "ours") -> bool:
    raw = next(iter(speeds.values()))
    print(f"\n{title}")
    for name, speed in speeds.items():
        print(f"  {name:<44} {speed:>10,.0f} /s   {speed / raw:5.2f}")
    met = mark is None or speeds[ours] / raw >= mark
    if mark is not None:
        print(f"  {ours} / {next(iter(speeds))}: {speeds[ours] / raw:.2f} (mark {mark}): {'met' if met else 'MISSED'}")
    return met


def consuming(bus: Bus, queue: str, count: int) -> float:
    "Events a second from the first that is handled to the last."
    done, seen = threading.Event(), []

    def handle(event: Event) -> None:
        seen.append(time.perf_counter())
        if len(seen) == count:
            done.set()

    work = bus.subscribe(queue, "#", handle, prefetch=500)
    if not done.wait(120):
        raise TimeoutError(f"{len(seen)} of {count} events came")
    work.close()
    return (count - 1) / (seen[-1] - seen[0])


# ---- embedded


def sqlite_publish(folder: Path) -> bool:
    events = [an_event(i) for i in range(EVENTS)]
    rows = [("q", e.event_id, e.event_type, e.correlation_id, e.to_json(), 1) for e in events]
    names = iter(range(10_000))

    def raw(make: bool) -> float:
        db = sqlite3.connect(folder / f"raw{next(names)}.db", isolation_level=None)
        db.execute("pragma journal_mode=wal")
        db.execute("pragma synchronous=normal")
        db.executescript(file_queue._SCHEMA)

        def insert() -> None:
            for start in range(0, EVENTS, 100):
                batch = rows[start : start + 100]
                if make:
                    chunk = events[start : start + 100]
                    batch = [("q", e.event_id, e.event_type, e.correlation_id, e.to_json(), 1) for e in chunk]
                db.execute("begin immediate")
                db.executemany(file_queue._INSERT, batch)
                db.execute("commit")

        speed = rate(insert, EVENTS)
        db.close()
        return speed

    def ours() -> float:
        with connect(f"sqlite:///{folder}/ours{next(names)}.db") as bus:
            bus.subscribe("q", "#", lambda event: None).close()
            return rate(lambda: bus.publish_many(events, window=100), EVENTS)

    def memory() -> float:
        with connect("memory://") as bus:
            bus.subscribe("q", "#", lambda event: None).close()
            return rate(lambda: bus.publish_many(events, window=100), EVENTS)

    sides: dict[str, Side] = {
        "raw SQLite, events to rows, batches of 100": lambda: raw(make=True),
        "ours": ours,
        "raw SQLite, rows made before": lambda: raw(make=False),
        "ours, memory://": memory,
    }
    return table("embedded: publish", in_turns(sides), 0.8)


def delivery(folder: Path) -> bool:
    met = True
    print("\nembedded: from publish() to the handler's first line, in process")
    for url in ("memory://", f"sqlite:///{folder}/delivery.db"):
        with connect(url) as bus:
            began, came = threading.Semaphore(0), [0.0]

            def handle(event: Event, began: threading.Semaphore = began, came: list[float] = came) -> None:
                came[0] = time.perf_counter()
                began.release()

            bus.subscribe("q", "#", handle)
            took = []
            for event in [an_event(i) for i in range(3_000)]:
                start = time.perf_counter()
                bus.publish(event)
                began.acquire()
                took.append(1e6 * (came[0] - start))
        p50, p99 = statistics.median(took), sorted(took)[int(0.99 * len(took))]
        met &= p50 <= 150
        print(f"  {url.split(':')[0]:<10} p50 {p50:6.0f} µs   p99 {p99:6.0f} µs   (mark 150): {'met' if p50 <= 150 else 'MISSED'}")
    return met


# ---- RabbitMQ


def pika_window(url: str, bodies: list[bytes], window: int, confirm: bool) -> float:
    "Raw pika: publish in windows of confirms, or without any."
    import pika

    state = {"sent": 0, "acked": 0, "start": 0.0, "took": 0.0}
    properties = pika.BasicProperties(delivery_mode=2)

    def fill(channel: pika.channel.Channel) -> None:
        for body in bodies[state["sent"] : state["sent"] + window]:
            channel.basic_publish("raw", "data.ingested", body, properties, mandatory=confirm)
        state["sent"] = min(len(bodies), state["sent"] + window)
        if not confirm:
            if state["sent"] < len(bodies):
                connection.ioloop.call_later(0, lambda: fill(channel))
            else:
                finish()

    def finish() -> None:
        state["took"] = time.perf_counter() - state["start"]
        connection.close()

    def on_ack(frame: pika.frame.Method) -> None:
        state["acked"] = frame.method.delivery_tag if frame.method.multiple else state["acked"] + 1
        if state["acked"] >= len(bodies):
            finish()
        elif state["acked"] >= state["sent"]:
            fill(channel_of[0])

    channel_of: list[pika.channel.Channel] = []

    def on_channel(channel: pika.channel.Channel) -> None:
        channel_of.append(channel)
        if confirm:
            channel.confirm_delivery(on_ack, lambda _: begin())
        else:
            begin()

    def begin() -> None:
        state["start"] = time.perf_counter()
        fill(channel_of[0])

    connection = pika.SelectConnection(
        pika.URLParameters(url),
        on_open_callback=lambda c: c.channel(on_open_callback=on_channel),
        on_close_callback=lambda c, _: c.ioloop.stop(),
    )
    connection.ioloop.start()
    return len(bodies) / state["took"]


def pika_consume(url: str, count: int) -> float:
    import pika

    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=500)
    seen: list[float] = []

    def on_message(channel, method, properties, body) -> None:  # type: ignore[no-untyped-def]
        seen.append(time.perf_counter())
        channel.basic_ack(method.delivery_tag)
        if len(seen) == count:
            channel.stop_consuming()

    channel.basic_consume("raw", on_message)
    channel.start_consuming()
    connection.close()
    return (count - 1) / (seen[-1] - seen[0])


def rabbitmq(folder: Path, anchors: bool) -> bool:
    import pika

    with server("rabbitmq", folder / "rabbitmq") as broker:
        url = broker.url
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            channel = connection.channel()
            channel.exchange_declare("raw", "topic", durable=True)
            channel.queue_declare("raw", durable=True, arguments={"x-max-priority": 2})
            channel.queue_bind("raw", "raw", "#")

            def empty() -> None:
                channel.queue_purge("raw")

            events = [an_event(i) for i in range(EVENTS)]
            bodies = [e.to_json() for e in events]
            bus = connect(url, ledger=folder / "rabbit-ledger.db")
            bus.subscribe("q", "#", lambda event: None).close()

            def drain() -> None:
                consuming(bus, "q", bus.depth("q")["ready"])

            def raw(window: int, confirm: bool) -> Side:
                def side() -> float:
                    empty()
                    return pika_window(url, bodies, window, confirm)

                return side

            speeds: dict[str, list[float]] = {}
            for _ in range(ROUNDS):
                fresh = [an_event(i) for i in range(EVENTS)]
                one_round: dict[str, Side] = {
                    "pika, confirms in windows of 500": raw(500, True),
                    "ours": lambda fresh=fresh: rate(lambda: bus.publish_many(fresh), EVENTS),  # type: ignore[misc]
                    "pika, without confirms": raw(500, False),
                    "consume: pika, manual ack": lambda: pika_consume(url, EVENTS),
                    "consume: ours": lambda: consuming(bus, "q", EVENTS),
                }
                for name, side in one_round.items():
                    speeds.setdefault(name, []).append(side())
            found = {name: statistics.median(values) for name, values in speeds.items()}
            publish = {k: v for k, v in found.items() if not k.startswith("consume")}
            if anchors:
                publish |= rabbit_anchors(url, bodies)
            met = table("RabbitMQ: publish", publish, 0.9)
            take = {k.removeprefix("consume: "): v for k, v in found.items() if k.startswith("consume")}
            met &= table("RabbitMQ: consume", take, 0.8)
            bus.close()
    return met


def rabbit_anchors(url: str, bodies: list[bytes]) -> dict[str, float]:
    found = {}
    if importlib.util.find_spec("faststream") and importlib.util.find_spec("aio_pika"):
        from faststream.rabbit import RabbitBroker

        async def publish() -> float:
            async with RabbitBroker(url) as broker:
                start = time.perf_counter()
                for body in bodies[:2_000]:
                    await broker.publish(body, "anchor", persist=True)
                return 2_000 / (time.perf_counter() - start)

        found["FastStream, one by one (its way)"] = asyncio.run(publish())
    if importlib.util.find_spec("kombu"):
        import kombu

        with kombu.Connection(url, transport_options={"confirm_publish": True}) as connection:
            producer = connection.Producer()
            work = lambda: [producer.publish(b, routing_key="anchor", delivery_mode=2) for b in bodies[:2_000]]
            found["kombu, confirmed one by one (its way)"] = rate(work, 2_000)
    return found


# ---- Redis


def redis_streams(folder: Path) -> bool:
    import redis

    with server("redis", folder / "redis") as broker:
        db = redis.Redis.from_url(broker.url)
        events = [an_event(i) for i in range(EVENTS)]
        bodies = [e.to_json() for e in events]
        bus = connect(broker.url, ledger=folder / "redis-ledger.db")
        bus.subscribe("q", "#", lambda event: None).close()

        def raw() -> float:
            def work() -> None:
                for start in range(0, EVENTS, 100):
                    pipe = db.pipeline(transaction=False)
                    for body in bodies[start : start + 100]:
                        pipe.xadd("raw", {"b": body})
                    pipe.execute()

            speed = rate(work, EVENTS)
            db.delete("raw")
            return speed

        speeds: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            fresh = [an_event(i) for i in range(EVENTS)]
            speeds.setdefault("raw pipeline of 100 XADD", []).append(raw())
            speeds.setdefault("ours", []).append(rate(lambda fresh=fresh: bus.publish_many(fresh, window=100), EVENTS))  # type: ignore[misc]
            speeds.setdefault("ours, consume", []).append(consuming(bus, "q", EVENTS))
        met = table("Redis Streams (appendfsync always)", {k: statistics.median(v) for k, v in speeds.items()}, 0.7)
        bus.close()
        db.close()
    return met


# ---- parsing and importing


def parse() -> bool:
    body = an_event(1).to_json()
    plain = TypeAdapter(reduce(or_, list(Event.types.values())[:12]))
    took = {
        name: min(timeit.repeat(lambda read=read: read(body), number=2_000, repeat=7)) / 2_000 * 1e6
        for name, read in {"plain union of 12 types": plain.validate_json, "parse_event": parse_event}.items()
    }
    met = took["parse_event"] <= 3.5
    print(f"\nparse: {', '.join(f'{name} {micro:.1f} µs' for name, micro in took.items())} (mark 3.5): {'met' if met else 'MISSED'}")
    return met


def importing() -> bool:
    code = "import time; t = time.perf_counter(); import mlops_lib.events.bus; print(time.perf_counter() - t)"
    took = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5))
    met = took <= 0.25
    print(f"\nimport mlops_lib.events.bus: {took:.3f} s (mark 0.25): {'met' if met else 'MISSED'}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["sqlite", "delivery", "rabbitmq", "redis", "parse", "import"])
    parser.add_argument("--anchors", action="store_true")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}; events of {len(an_event(1).to_json())} bytes")
    met = True
    with tempfile.TemporaryDirectory(prefix="mlops-bus-") as name:
        folder = Path(name)
        sides: dict[str, Callable[[], bool]] = {
            "sqlite": lambda: sqlite_publish(folder),
            "delivery": lambda: delivery(folder),
            "rabbitmq": lambda: rabbitmq(folder, options.anchors),
            "redis": lambda: redis_streams(folder),
            "parse": parse,
            "import": importing,
        }
        for what in options.what:
            try:
                met &= sides[what]()
            except ServerError as e:
                print(f"\n{what}: not measured: {e}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
