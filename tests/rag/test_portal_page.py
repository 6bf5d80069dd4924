"""The page in a real browser: a document from its upload to its deletion, and nothing that a document says becomes a program."""

import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from support import private

from mlops_lib.rag.documents import Library, platform
from mlops_lib.rag.index import Index
from mlops_lib.rag.portal import create_portal
from mlops_lib.serving.api import background

expect.set_options(timeout=60_000)
FILLING = "Nothing of what stands here is asked for, and it is only here so that somebody has to scroll. " * 200
SENTENCE = "We pay the money back within 5 working days after the parcel has reached the warehouse in Ghent."
RETURNS = f"# Returns 📦📦\n\n😀 {FILLING}\n\n{SENTENCE} Gift cards are never refunded.\n\n{FILLING}"
QUESTION = "When do you pay the money back?"
EVIL = "Attention! <script>window.harmed = 1</script> <img src=x onerror='window.harmed = 2'> <b>Pay the invoice of Mordor by Friday.</b>"


def by_words(text: str) -> Any:
    "A classifier that needs no training."
    if "unclassifiable" in text:
        raise ValueError("nobody knows what this is")
    return SimpleNamespace(category="legal" if "contract" in text else "business", confidence=0.9, version="test")


@pytest.fixture(params=["embedded", "stack"])
def library(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    "The platform without any server, and on RabbitMQ, Chroma's server and Redis."
    with contextlib.ExitStack() as running:
        how: dict[str, Any] = {}  # nothing is put in its place: lesson 65 classifies
        if request.param == "stack":
            at = {name: running.enter_context(private(name, tmp_path / name)).url for name in ("rabbitmq", "chroma", "redis")}
            index = running.enter_context(contextlib.closing(Index(f"page-{uuid.uuid4().hex[:8]}", url=at["chroma"])))
            how |= {"bus": at["rabbitmq"], "index": index, "history": at["redis"], "ledger": tmp_path / "ledger.db"}
        yield running.enter_context(platform(tmp_path / "library", **how))


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Library]:
    with platform(tmp_path / "library", classify=by_words) as one:
        yield one


@dataclass
class Visit:
    "A page, and what it did that a user does not see."

    page: Page
    url: str
    folder: Path
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def row(self, name: str) -> Locator:
        return self.page.locator("#documents > li").filter(has=self.page.get_by_text(name, exact=True))

    def upload(self, **texts: str | bytes) -> None:
        "Choose files and send them; `a_txt` is called a.txt."
        paths = []
        for name, text in texts.items():
            path = self.folder / name.replace("_", ".")
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            paths.append(path)
        self.page.get_by_label("Upload documents").set_input_files(paths)

    def ask(self, question: str) -> None:
        self.page.get_by_label("What do you want to know?").fill(question)
        self.page.get_by_role("button", name="Ask", exact=True).click()


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Visit]]:
    with contextlib.ExitStack() as ending:

        def opened(library: Library, api_key: str = "", **about: Any) -> Visit:
            url = ending.enter_context(background(create_portal(library, api_key=api_key)))
            context = browser.new_context(**about)
            ending.callback(context.close)
            folder = tmp_path / f"files-{uuid.uuid4().hex[:8]}"
            folder.mkdir()
            one = Visit(context.new_page(), url, folder)
            one.page.on("request", lambda r: one.asked.append(r.url))
            one.page.on("pageerror", lambda e: one.errors.append(str(e)))
            one.page.on("console", lambda m: one.errors.append(m.text) if m.type == "error" and "status of" not in m.text else None)
            one.page.goto(url)
            return one

        yield opened


def in_sight(place: Locator) -> bool:
    "Can a user see it without scrolling?"
    return bool(place.evaluate("e => { const r = e.getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight && r.height > 0 }"))


def test_a_document_from_its_upload_to_its_deletion(visit: Callable[..., Visit], library: Library) -> None:
    one = visit(library)
    page = one.page
    expect(page.get_by_text("There are no documents yet.")).to_be_visible()
    one.upload(returns_md=RETURNS, contract_txt="This contract ends in May, and the parties agree to indemnify each other.")

    row = one.row("returns.md")
    expect(row).to_have_attribute("data-state", "indexed")
    expect(row.locator(".way li.done")).to_have_count(3)
    expect(row.locator(".way")).to_contain_text(re.compile(r"received.*classified after .*indexed after "))
    expect(row).to_contain_text(re.compile(r"\w+, \d+ % sure · \d+ passages · 3\d\.\d kB"))
    expect(one.row("contract.txt")).to_have_attribute("data-state", "indexed")
    expect(one.row("contract.txt")).to_contain_text("legal, ")
    expect(page.get_by_label("Look in").locator("option")).to_contain_text(["all documents", "legal documents"])

    one.ask(QUESTION)
    expect(page.locator("#said")).to_contain_text(SENTENCE)
    source = page.get_by_role("button", name="1. Returns")
    expect(page.get_by_role("list", name="Sources")).to_contain_text(SENTENCE)
    source.click()
    passage = page.get_by_role("dialog").locator("mark")
    expect(passage).to_contain_text(SENTENCE)
    assert passage.text_content() == SENTENCE, "not a character more, though emoji stand before it"
    assert in_sight(passage)
    assert page.locator("#text").text_content().replace("… ", "").startswith(("# Returns", "Nothing", "😀"))
    page.get_by_role("button", name="Close").click()

    page.get_by_label("Look in").select_option("legal")
    one.ask(QUESTION)
    expect(page.locator("#said")).to_have_text("That is not in the documents.")

    page.get_by_role("button", name="Delete returns.md").click()
    expect(row).to_have_count(0)
    expect(page.get_by_role("status")).to_have_text("returns.md is deleted.")
    expect(page.get_by_label("Look in")).to_have_value("legal")
    page.get_by_label("Look in").select_option("")
    one.ask(QUESTION)
    expect(page.locator("#said")).to_have_text("That is not in the documents.")
    assert [s.name for s in library.statuses()] == ["contract.txt"]
    assert not one.errors
    assert all(asked.startswith(one.url) for asked in one.asked), "nothing is loaded from elsewhere"


def test_what_a_document_says_is_text(visit: Callable[..., Visit], embedded: Library) -> None:
    embedded.upload(EVIL.encode(), "<img src=x onerror=alert(1)>.txt")
    embedded.upload(f"# {EVIL}\n\nAnother invoice, of Gondor, is paid on Monday.".encode(), "title.md")
    one = visit(embedded)
    page = one.page
    expect(page.locator("#documents > li[data-state=indexed]")).to_have_count(2)
    expect(one.row("<img src=x onerror=alert(1)>.txt")).to_be_visible()
    for question in ("Who pays the invoice of Mordor by Friday?", "When is the invoice of Gondor paid?"):
        one.ask(question)
        expect(page.locator("#sources > li").first).to_be_visible()
        page.locator("#sources button").first.click()
        expect(page.get_by_role("dialog").locator("mark")).to_be_visible()
        page.keyboard.press("Escape")
    one.row("<img src=x onerror=alert(1)>.txt").get_by_role("button").first.click()
    expect(page.locator("#text")).to_have_text(EVIL)
    assert page.locator("img, #text script, b").count() == 0
    assert page.evaluate("window.harmed") is None
    assert not one.errors, "the policy had nothing to stop, because nothing was tried"


def test_the_browser_refuses_what_the_page_does_not_do(visit: Callable[..., Visit], embedded: Library) -> None:
    page = visit(embedded).page
    tried = """() => { try { document.body.innerHTML = "<img src=x onerror='window.harmed = 1'>"; return "done" } catch (e) { return e.name } }"""
    assert page.evaluate(tried) == "TypeError"
    added = """() => { const s = document.createElement('script'); try { s.textContent = 'window.harmed = 1' } catch { }; document.body.append(s); return window.harmed }"""
    assert page.evaluate(added) is None


def test_mistakes_are_told_in_words(visit: Callable[..., Visit], embedded: Library) -> None:
    one = visit(embedded)
    page = one.page
    one.upload(scan_pdf=b"%PDF-1.7 and no more", fine_txt="These words are fine.", odd_txt="This is unclassifiable.")
    expect(page.get_by_role("alert").first).to_contain_text("'scan.pdf' is not taken. It is a broken PDF")
    expect(one.row("fine.txt")).to_have_attribute("data-state", "indexed")
    expect(one.row("odd.txt")).to_have_attribute("data-state", "failed")
    one.upload(again_md="These words are fine.")
    expect(page.get_by_role("status")).to_have_text("fine.txt is here already.")
    expect(page.locator("#documents > li")).to_have_count(2)
    expect(one.row("odd.txt")).to_contain_text("nobody knows what this is")
    assert one.row("odd.txt").get_by_role("button").count() == 1, "it can be deleted, not opened"
    one.ask("   ")
    expect(page.get_by_label("What do you want to know?")).to_be_focused()
    page.route("**/answer", lambda route: route.abort())
    one.ask("Are these words fine?")
    expect(page.locator("#ask-problem")).to_have_text("The server does not answer. Is it running?")
    page.unroute("**/answer")
    one.ask("Are these words fine?")
    expect(page.locator("#ask-problem")).to_be_empty()
    expect(page.locator("#said")).not_to_be_empty()


def test_what_others_upload_and_delete_is_seen(visit: Callable[..., Visit], embedded: Library) -> None:
    one = visit(embedded)
    expect(one.page.get_by_text("There are no documents yet.")).to_be_visible()
    id = embedded.upload(b"Somebody else wrote this.", "other.txt").document_id
    one.page.evaluate("dispatchEvent(new Event('focus'))")  # somebody comes back to the tab
    expect(one.row("other.txt")).to_have_attribute("data-state", "indexed")
    embedded.delete(id)
    expect(one.row("other.txt")).to_have_count(0)  # seconds later, without anything being done


def test_files_can_be_dropped(visit: Callable[..., Visit], embedded: Library) -> None:
    one = visit(embedded)
    data = one.page.evaluate_handle("() => { const d = new DataTransfer(); d.items.add(new File(['Words that fell.'], 'dropped.txt')); return d }")
    one.page.locator("#drop").dispatch_event("drop", {"dataTransfer": data})
    expect(one.row("dropped.txt")).to_have_attribute("data-state", "indexed")
    assert one.page.url == f"{one.url}/"


def test_a_key_is_asked_for_and_kept_for_this_tab(visit: Callable[..., Visit], embedded: Library) -> None:
    embedded.upload(b"Behind a lock.", "locked.txt")
    one = visit(embedded, api_key="a-long-secret-key")
    page = one.page
    for key, seen in (("not-the-right-key", 0), ("a-long-secret-key", 1)):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Open").click()
        if seen:
            expect(one.row("locked.txt")).to_be_visible()
            expect(page.get_by_label("API key")).to_be_hidden()
        else:
            expect(page.get_by_role("status")).to_have_text("A key is needed.")
    page.reload()
    expect(one.row("locked.txt")).to_be_visible()
    assert "a-long-secret-key" not in "".join(one.asked), "a key is no part of an address"


# ---- everybody


def test_everything_can_be_done_with_the_keyboard(visit: Callable[..., Visit], embedded: Library) -> None:
    embedded.upload(RETURNS.encode(), "returns.md")
    one = visit(embedded)
    page = one.page
    expect(one.row("returns.md")).to_have_attribute("data-state", "indexed")
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent)"))
    assert reached == ["file", "returns.md", "Delete returns.md", "question", "category", "ask"]
    page.get_by_label("What do you want to know?").focus()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Control+Enter")
    source = page.get_by_role("button", name="1. Returns")
    expect(source).to_be_visible()
    source.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").locator("mark")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(source).to_be_focused()
    page.get_by_role("button", name="Delete returns.md").focus()
    page.keyboard.press("Enter")
    expect(one.row("returns.md")).to_have_count(0)
    expect(page.get_by_label("Upload documents")).to_be_focused()


CONTRAST = """() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const numbers = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c } return [255, 255, 255] };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const words = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!words || !e.checkVisibility() || ["SCRIPT", "OPTION"].includes(e.tagName)) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + " " + e.textContent.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark_and_on_a_telephone(visit: Callable[..., Visit], embedded: Library, scheme: str) -> None:
    embedded.upload(RETURNS.encode(), "a-name-that-is-so-long-and-without-any-space-that-no-telephone-is-wide-enough-for-it-and-then-some.md")
    embedded.upload(b"This is unclassifiable.", "odd.txt")
    one = visit(embedded, color_scheme=scheme, viewport={"width": 320, "height": 700})
    page = one.page
    expect(page.locator("#documents > li[data-state=indexed]")).to_have_count(1)
    expect(one.row("odd.txt")).to_have_attribute("data-state", "failed")
    one.ask(QUESTION)
    expect(page.locator("#sources > li").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320, "nobody has to scroll sideways"
    page.locator("#sources button").first.click()
    expect(page.locator("mark")).to_be_visible()
    assert in_sight(page.locator("mark"))
    found = page.evaluate(CONTRAST)
    assert len(found) > 15
    assert not [(round(ratio, 2), what) for ratio, what in found if ratio < 4.5], "contrast, as WCAG AA asks for"


def test_every_control_has_a_name_and_every_id_is_there_once(visit: Callable[..., Visit], embedded: Library) -> None:
    embedded.upload(b"Some words.", "some.txt")
    one = visit(embedded)
    expect(one.row("some.txt")).to_have_attribute("data-state", "indexed")
    names = """() => [...document.querySelectorAll("button, input, textarea, select")].map(e => (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent).trim())"""
    assert all(one.page.evaluate(names))
    ids = one.page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert one.page.evaluate("() => [document.documentElement.lang, document.title]") == ["en", "Ask your documents"]
