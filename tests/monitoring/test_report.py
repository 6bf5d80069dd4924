"""A page is small, whole and safe, whatever the data are called."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd

from mlops_lib.monitoring.drift import detect
from mlops_lib.monitoring.report import headline, page, picture, table

RNG = np.random.default_rng(2)


class Tags(HTMLParser):
    "Which tags open, and whether each closes in its turn."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def window(n: int, shift: float = 0.0) -> pd.DataFrame:
    kind = RNG.choice(["<script>alert(1)</script>", "b & c"], n)
    return pd.DataFrame({"a<b>": RNG.normal(shift, 1, n), "kind": kind, "when": pd.Timestamp("2024-01-01"), "text": "one two three four five"})


def test_a_page_is_whole_and_runs_nothing_of_the_data() -> None:
    report = detect(window(300), window(200, 2), encode=lambda texts: np.ones((len(texts), 2)))
    for text in (page(report), table(report)):
        tags = Tags(text)
        assert not tags.stack
        assert not {"script", "b>"} & set(tags.seen)
        assert "a&lt;b&gt;" in text
    assert page(report).startswith("<!doctype html>")
    assert page(report).count("<svg") >= 2
    assert "1 of 4" in headline(report) or "2 of 4" in headline(report)


def test_each_column_has_a_picture_and_a_wide_page_stays_small() -> None:
    then, now = (pd.DataFrame(RNG.normal(size=(60, 120))).add_prefix("x") for _ in range(2))
    report = detect(then, now, joint=False)
    assert page(report).count("<svg") == 120
    wide = pd.DataFrame({f"{k}" * 40: RNG.normal(size=40) for k in range(1_500)})
    large = page(detect(wide, wide, joint=False))
    assert len(large.encode()) <= 500_000
    assert "more in <code>to_dict()</code>" in large
    assert not Tags(large).stack


def test_the_picture_has_all_rows_also_those_far_out() -> None:
    then = pd.DataFrame({"x": RNG.normal(size=500), "same": 1.0})
    report = detect(then, then.assign(x=lambda f: np.where(f.index % 2, 1e12, f["x"]), same=2.0))
    assert all("<path" in picture(f) for f in report.features)
    assert picture(detect(then, then.assign(x=np.nan)).features["x"]) == ""
