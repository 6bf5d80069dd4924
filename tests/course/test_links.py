"""Every link of every notebook, of the README and of the benchmarks' page: what it leads to exists, or it is a well-formed address."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for folder in ("notebooks", "exercises", "solutions") for p in (ROOT / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAGES += [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:a|img)\b[^>]*?(?:href|src)=[\"']([^\"']*)[\"']|<(https?://[^>\s]+)>")


def prose(path: Path) -> str:
    "What a reader sees as text: no code cells, no code in it."
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"(?ms)^(```|~~~).*?^\1|`[^`\n]+`", "", text)


def links(path: Path) -> Iterator[str]:
    for match in LINK.finditer(prose(path)):
        yield next(group for group in match.groups() if group is not None)


def anchors(path: Path) -> set[str]:
    "As GitHub makes them (small letters, hyphens), and as JupyterLab does (hyphens only)."
    text = re.sub(r"(?ms)^(```|~~~).*?^\1", "", path.read_text("utf-8")) if path.suffix == ".md" else ""
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "markdown")
    titles = [t.replace("`", "").strip() for t in re.findall(r"(?m)^#+ (.+?)\s*#*$", text)]
    named = set(re.findall(r"<a\s+(?:id|name)=[\"']([^\"']+)", text))
    return named | {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles} | {t.replace(" ", "-") for t in titles}


def trouble(path: Path, link: str) -> str:
    "What is wrong with a link; nothing when it is right."
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        host = parts.hostname or ""
        local = host in ("localhost", "127.0.0.1")
        return "" if local or re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", host) else "is no address of a host"
    if parts.scheme == "mailto":
        return "" if re.fullmatch(r"[^@\s]+@[^@\s]+\.[a-z]+", parts.path) else "is no address of mail"
    if parts.scheme or link.startswith("/") or not link:
        return "is neither relative nor http(s)"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.exists():
        return "leads to nothing"
    if ROOT not in (target, *target.parents):
        return "leads out of the workspace"
    if parts.fragment and unquote(parts.fragment) not in anchors(target):
        return f"leads to no heading of {target.name}"
    return ""


@pytest.mark.parametrize("folder", ["notebooks", "exercises", "solutions", "README.md", "benchmarks/README.md"])
def test_every_link_leads_somewhere(folder: str) -> None:
    pages = [p for p in PAGES if p.is_relative_to(ROOT / folder)]
    found = [(p, link) for p in pages for link in links(p)]
    assert pages
    wrong = [f"{p.relative_to(ROOT)}: {link} {why}" for p, link in found if (why := trouble(p, link))]
    assert not wrong, "\n".join(wrong)


def test_lessons_and_exercises_lead_to_each_other() -> None:
    for lesson in (ROOT / "notebooks").glob("*/*.ipynb"):
        exercise = ROOT / "exercises" / lesson.parent.name / lesson.name
        assert exercise.is_file(), f"{lesson.name} has no exercise"
        there = {(lesson.parent / unquote(urlsplit(link).path)).resolve() for link in links(lesson)}
        back = {(exercise.parent / unquote(urlsplit(link).path)).resolve() for link in links(exercise)}
        assert exercise in there, f"{lesson.name} does not lead to its exercise"
        assert lesson in back, f"the exercise of {lesson.name} does not lead back"


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("no_such.md", "leads to nothing"),
        ("README.md#no-such-heading", "leads to no heading of README.md"),
        ("README.md#the-lessons", ""),
        ("../", "leads out of the workspace"),
        ("/etc/passwd", "is neither relative nor http(s)"),
        ("", "is neither relative nor http(s)"),
        ("https://", "is no address of a host"),
        ("https://exa mple.org/x", "is no address of a host"),
        ("htps://example.org", "is neither relative nor http(s)"),
        ("https://example.org/a?b=c#d", ""),
        ("http://127.0.0.1:8000/docs", ""),
    ],
)
def test_what_is_wrong_with_a_link_is_seen(link: str, why: str) -> None:
    assert trouble(ROOT / "x.md", link) == why


def test_links_are_found_in_text_and_not_in_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('[a](b.md) `[c](d.md)` ![e](f.png "g") <a href="h.md">i</a> <https://j.org>\n```\n[k](l.md)\n```\n[m [n]](o.md#p)\n')
    assert list(links(page)) == ["b.md", "f.png", "h.md", "https://j.org", "o.md#p"]
