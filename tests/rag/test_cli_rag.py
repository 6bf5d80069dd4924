"""`mlops rag` as it is typed: defaults, refusals, exit codes, and public sets on the disk."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from mlops_lib.cli import cli
from mlops_lib.rag import evaluation
from mlops_lib.settings import settings


def call(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["rag", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "An index folder of its own."
    monkeypatch.setattr("mlops_lib.rag.index.settings", settings.model_copy(update={"data_dir": tmp_path / "data"}))
    return tmp_path


@pytest.fixture
def small_course(own: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    "A course of three lessons: the whole one takes a minute to index."
    files = evaluation.course_documents()
    kept = {name: files[name] for name in ("4_events/41_bus.ipynb", "4_events/43_outbox.ipynb", "0_start/01_logs.ipynb")}
    monkeypatch.setattr(evaluation, "course_documents", lambda parts=None: kept)
    return list(kept)


def test_without_an_index_the_course_is_asked_and_indexed_once(small_course: list[str]) -> None:
    code, out, err = call("query", "What becomes of a message that nobody can handle?", "--json")
    assert code == 0, err
    hits = json.loads(out)
    assert {h["document"] for h in hits} <= set(small_course)
    assert all(0 <= h["score"] <= 1 for h in hits)
    lesson = Path(evaluation.course_folder(), hits[0]["document"])
    assert lesson.is_file()
    first, second = (json.loads(call("stats", "--json")[1]) for _ in range(2))
    assert first["documents"] == 3
    assert first["version"] == second["version"], "nothing had changed, so nothing was written"


def test_an_answer_is_quoted_and_its_absence_is_said(small_course: list[str]) -> None:
    code, out, err = call("answer", "Why does a service write an event into its outbox first?", "--model", "extractive", "--json")
    told = json.loads(out)
    assert code == (0 if told["found"] else 1), err
    lesson = {name: file for name, file in evaluation.course_texts().items() if name in small_course}
    assert all(lesson[q["document"]][q["start"] : q["end"]] == q["text"] for q in told["quotes"])
    code, out, err = call("answer", "Which wine goes with fish?", "--model", "extractive")
    assert code == 1
    assert "not in the documents" in out
    code, out, err = call("answer", "anything", "--model", "magic:lamp")
    assert (code, out) == (1, "")
    assert "magic:lamp" in err


def test_the_course_is_measured_in_every_mode_and_a_floor_is_a_gate(small_course: list[str]) -> None:
    code, out, err = call("evaluate", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert list(told["modes"]) == ["dense", "bm25", "hybrid"]
    assert 0 < told["answerable"] < told["questions"]
    for means in told["modes"].values():
        assert 0 < means["ndcg@10"] <= 1
        assert 0 <= means["auroc"] <= 1
    best = max(means["ndcg@10"] for means in told["modes"].values())
    assert call("evaluate", "--floor", 0.05)[0] == 0
    code, out, err = call("evaluate", "--floor", min(1.0, best + 0.001))
    assert code == 1
    assert "below" in err
    assert "ndcg@10" in out, "the figures are shown all the same"


def test_what_is_refused_is_named_and_the_rest_is_indexed(own: Path) -> None:
    folder = own / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# Pumps\n\nA pump moves water uphill.\n")
    (folder / "b.txt").write_bytes(b"\x00\x01\x02\x03" * 100)
    code, out, err = call("index", folder, "--index", "pumps", "--field", "team", "water", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["documents"] == 1
    assert "b.txt" in err
    assert list(told["refused"]) == [str(folder / "b.txt")]
    assert json.loads(call("index", folder, "--index", "pumps", "--field", "team", "water", "--json")[1])["unchanged"] == 1
    hit = json.loads(call("query", "How does water get up the hill?", "--index", "pumps", "--json", "--where", '{"team": "water"}')[1])[0]
    assert call("delete", hit["document"], "--index", "pumps")[0] == 0
    code, _, err = call("query", "water", "--index", "pumps")
    assert code == 1
    assert "nothing in the index" in err


def test_a_folder_without_anything_readable_is_a_failure(own: Path) -> None:
    (own / "docs").mkdir()
    (own / "docs" / "a.bin").write_bytes(b"\x7fELF")
    code, _, err = call("index", own / "docs", "--index", "none")
    assert code == 1
    assert "a.bin" in err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("query", "  ", "--index", "pumps"), 1, "pumps"),
        (("query", "water", "-k", 0), 2, "0"),
        (("query", "water", "--mode", "magic"), 2, "magic"),
        (("query", "water", "--where", "{team: water}"), 1, "JSON"),
        (("query", "water", "--index", "no good name!"), 1, "no good name!"),
        (("delete", "x", "--index", "pumps"), 1, "pumps"),
        (("index", "not/there.md"), 2, "not/there.md"),
        (("evaluate", "--floor", 2), 2, "2"),
    ],
)
def test_what_was_asked_wrongly_is_one_sentence(own: Path, args: tuple[Any, ...], code: int, said: str) -> None:
    got, out, err = call(*args)
    assert (got, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_a_folder_in_the_form_of_beir_counts_documents_not_places(own: Path) -> None:
    folder = own / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts = {f"d{n}": " ".join([topic] * 40) for n, topic in enumerate(["pumps move water.", "queues keep messages.", "stars are far away."])}
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"_id": i, "title": f"About {i}", "text": t}) for i, t in texts.items()))
    queries = {"q0": "how is water moved", "q1": "who keeps messages", "q2": "how far away are stars"}
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": i, "text": t}) for i, t in queries.items()))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(f"q{n}\td{n}\t1" for n in range(3)) + "\n")
    code, out, err = call("evaluate", "--beir", folder, "--mode", "hybrid", "--mode", "multi", "--json")
    assert code == 0, err
    modes = json.loads(out)["modes"]
    assert list(modes) == ["hybrid", "multi"]
    assert all(means["ndcg@10"] == means["recall@10"] == 1 for means in modes.values()), modes
    assert call("evaluate", "--beir", folder, "--squad", folder / "corpus.jsonl")[0] == 1


def test_a_set_with_labels_that_point_nowhere_says_so(own: Path) -> None:
    text = "Rain falls on the plain in spring."
    good = {"id": "1", "question": "When does rain fall?", "answers": [{"text": "in spring", "answer_start": text.index("in spring")}]}
    bad = {"id": "2", "question": "Where?", "answers": [{"text": "on the moon", "answer_start": 3}]}
    file = own / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "Rain", "paragraphs": [{"context": text, "qas": [good, bad]}]}]}))
    code, out, err = call("evaluate", "--squad", file, "--mode", "dense", "--json")
    assert code == 0, err
    assert "left out" in err
    told = json.loads(out)
    assert told["questions"] == 1
    assert told["modes"]["dense"]["ndcg@10"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_the_platform_is_served_until_it_is_told_to_end(own: Path, number: int) -> None:
    command = [sys.executable, "-c", "from mlops_lib.cli import cli; cli()", "rag", "serve", "--port", "0", "--folder", str(own / "library")]
    environment = os.environ | {"MLOPS_API_KEY": "a-long-secret-key"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as service:
        try:
            assert service.stdout
            said = service.stdout.readline()
            assert said.startswith("serving http://127.0.0.1:"), said
            url = said.split()[1]
            assert httpx.get(url, timeout=60).headers["content-type"] == "text/html; charset=utf-8"
            assert httpx.get(f"{url}/documents", timeout=60).status_code == 401
            with httpx.Client(base_url=url, headers={"x-api-key": "a-long-secret-key"}, timeout=60) as client:
                sent = client.post("/index", files={"file": ("pumps.md", b"# Pumps\n\nA pump moves water uphill.")})
                assert sent.status_code == 202, sent.text
            service.send_signal(number)
            out, err = service.communicate(timeout=60)
        finally:
            service.kill()
    assert service.returncode == 0, err
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["message"] for line in lines if line["logger"] == "mlops_lib.rag.portal"] == ["at work", "document taken", "stopped"]
    assert "a-long-secret-key" not in out + err


def test_a_port_that_is_taken_is_one_sentence(own: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = call("serve", "--port", taken.getsockname()[1], "--folder", own / "library")
    assert (code, out) == (1, "")
    assert "Choose another port" in err
    assert not (own / "library").exists(), "nothing was started"
