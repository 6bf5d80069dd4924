"""Model cards: what a run knows stands on them, what others wrote has no power over them, what is missing is named."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nbconvert.filters import markdown2html

from mlops_lib.registry import cards
from mlops_lib.registry.cards import (
    DECLARED,
    SECTIONS,
    Facts,
    check_card,
    code,
    curves_svg,
    declare,
    intervals,
    make_card,
    parts,
    plain,
    reliability,
    table,
    write_card,
)
from mlops_lib.registry.gates import RegistryError, find, freeze_exam, promote, rollback
from mlops_lib.registry.tracking import log_run, open_store, register
from mlops_lib.training import train

EVIL = "x | **b** <script>alert(1)</script> [l](javascript:alert(1)) ![i](http://x/y.png)\n\n## Limits\n- none `c` $e$ \\(f\\)"


def rows(n: int = 300, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    words = ["good", "bad", "fine", "slow", "refund", "broken", "love", "late"]
    frame = pd.DataFrame(
        {
            "amount": rng.normal(size=n).round(3),
            "since": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 90, n), unit="D"),
            "note": [" ".join(rng.choice(words, 9)) for _ in range(n)],
        }
    )
    frame.loc[::10, "amount"] = np.nan
    score = frame.note.str.count("good|love") + rng.normal(size=n) * 0.4
    return frame.assign(answer=np.select([score > 1.6, score > 0.6], ["happy", EVIL], "angry"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A store with three versions of 'm', the second one promoted."
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
    exam = freeze_exam(rows(300, 5), "answer", "m")
    quick = {"chars": 0, "shift": False}
    tries = [(rows(200, 1), "logistic", quick), (rows(300, 2), "logistic", {**quick, "C": 0.7}),
             (rows(300, 2), "xgboost", {"rounds": 15})]  # fmt: skip
    results = []
    for k, (data, kind, params) in enumerate(tries):
        done = train(kind, data, "answer", targets={"accuracy": 0.3 if k else 0.99}, params=params)
        register(log_run(done, data, store=store), "m", store=store)
        results.append(done)
    promote(2, exam, name="m", store=store, who=EVIL)
    return store, results


def text_of(html: str) -> str:
    return " ".join("".join(ET.fromstring(f"<x>{html}</x>").itertext()).split())


# --- words of others -------------------------------------------------------------------------------------------------


def cells(html: str) -> list[str]:
    return [" ".join(c.split()) for c in re.findall(r"(?s)<td[^>]*>(.*?)</td>", html)]


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from("|*_`<>[]()!#~$\\&:/.w \n-=+@^{}")), max_size=40))
def test_text_of_others_is_one_cell_without_markup(text):
    seen = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    page = table(["a", "b"], [(1, f"x{plain(text)}x")])
    commonmark = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for html in (commonmark.render(page), markdown2html(page)):
        found = cells(html)
        assert len(found) == 2
        assert not re.search(r"<\w", found[1]), "no element of any kind"
        assert text_of(found[1]) == " ".join(f"x{seen}x".split())


@pytest.mark.parametrize(
    "text",
    ["https://evil.example/x", "www.evil.example", "HTTP://WWW.x.de", "a\u202egnp.exe", "$x$", r"\(x\)", r"\\[x\\]"],
)
def test_no_link_no_formula_no_turned_text(text):
    html = markdown2html(f"said: {plain(text)}")
    assert "<a" not in html
    assert "\u202e" not in html
    assert not re.search(r"\$|\\\\[(\[]", plain(text)), "Jupyter looks for formulas before it reads Markdown"


def test_long_text_is_cut_and_names_are_code_only_where_that_is_safe():
    assert len(plain("a" * 900)) == 500
    assert plain("a" * 900).endswith("…")
    assert code("f1_weighted@10") == "`f1_weighted@10`"
    for odd in ("a`b", "a|b", "", " a", "a  b", "ä", "a\nb"):
        assert not code(odd).startswith("`")


def test_a_hostile_model_draws_nothing_on_its_card(world):
    store, _ = world
    card = make_card(2, "m", store=store)
    assert re.findall(r"(?m)^## (.*)$", card.text) == list(SECTIONS)
    html = markdown2html(card.text)
    assert "<script" not in html
    assert "javascript:" not in re.sub(r"(?s)>[^<]*<", "><", html), "in no attribute"
    assert set(re.findall(r'<img[^>]*src="([^"]*)"', html)) == {f"MODEL_CARD_files/{n}" for n in card.pictures}
    assert html.count("<a ") == html.count('href="#') + 1, "the one link is to the paper"
    for svg in card.pictures.values():
        root = ET.fromstring(svg)
        assert not [e for e in root.iter() if e.tag.endswith("script")]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_intervals_hold_what_was_measured_and_narrow_with_more_rows():
    counts = pd.DataFrame([[80, 20], [30, 70]], ["a", "b"], ["a", "b"])
    few, many = intervals(counts), intervals(counts * 100)
    assert few["accuracy"][0] < 0.75 < few["accuracy"][1]
    assert few["recall_a"][0] < 0.8 < few["recall_a"][1]
    for name, (low, high) in many.items():
        assert (high - low) < 0.2 * (few[name][1] - few[name][0])
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 200)
    assert few["accuracy"] == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.012)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=9, max_size=9))
def test_intervals_of_any_confusion_are_shares(counts):
    names = list("abc")
    found = intervals(pd.DataFrame(np.reshape(counts, (3, 3)), names, names), draws=50)
    assert all(0 <= low <= high <= 1 for low, high in found.values())


def test_a_calibrated_model_is_within_luck_and_one_that_is_too_sure_is_not():
    rng = np.random.default_rng(3)
    sure = rng.uniform(0.5, 1, 3000)
    proba = np.column_stack([sure, 1 - sure])
    honest = reliability((rng.random(3000) > sure).astype(int), proba)
    assert honest.error <= honest.luck
    assert abs(honest.excess) < 0.03
    boastful = reliability((rng.random(3000) > 0.55).astype(int), proba)
    assert boastful.error > 3 * boastful.luck
    assert boastful.excess == pytest.approx(0.2, abs=0.03)
    assert int(boastful.bins.rows.sum()) == 3000


def test_the_card_tells_what_was_measured(world):
    store, results = world
    for number, done in enumerate(results, 1):
        text = write_card(number, name="m", store=store)
        line = next(line for line in text.splitlines() if line.startswith("| `accuracy` |"))
        assert [c.strip() for c in line.split("|")][2:4] == [
            f"{done.train_metrics['accuracy']:.3f}",
            f"{done.metrics['accuracy']:.3f}",
        ]
        assert f"tested on {len(done.y_true)}" in text
        report = done.report()
        assert f"| {report.loc['happy', 'precision']:.3f} | {report.loc['happy', 'recall']:.3f} |" in text
        worst = min(done.classes, key=lambda c: done.metrics[f"f1_{c}"])
        assert f"Class {code(worst)} is recognised worst: F1 {done.metrics[f'f1_{worst}']:.3f}" in text
    assert "missed its targets for `accuracy`" in write_card(1, name="m", store=store)
    assert "0.99: **missed**" in write_card(1, name="m", store=store)


def test_limits_name_what_was_not_seen(world):
    store, _ = world
    text = write_card(2, name="m", store=store)
    limits = text[text.index("## Limits") : text.index("## How to load")]
    assert "fewer than 9 or more than 9 words" in limits
    assert re.search(r"from 2024-01-0\d to 2024-03-\d\d \(`since`\)", limits)
    assert "`amount`" in limits
    assert "no missing value in `since`" in limits or "no missing value in `note`" in limits
    assert "no missing value in `amount`" not in limits


def test_decisions_aliases_and_changes_are_told(world):
    store, _ = world
    second, third = (write_card(v, name="m", store=store) for v in (2, 3))
    assert "| In service | since 20" in second
    assert "| In service | no |" in third
    assert "promoted" in second[second.index("## Decisions") : second.index("## Limits")]
    assert "better than" not in second, "there was no champion to beat"
    assert "100 fair rows" in second
    assert "has sat no exam" in third
    assert "compared with no other version" in third
    changes = {
        int(m[1]): m[2]
        for m in re.finditer(r"(?m)^\| \*{0,2}(\d)\*{0,2} \|(.*)$", third[third.index("## Changelog") :])
    }
    assert "the first version" in changes[1]
    assert "other data" in changes[2]
    assert "`C` 3.0 → 0.7" in changes[2]
    assert "other kind" in changes[3]
    assert "other data" not in changes[3]


def test_an_alias_that_was_moved_by_hand_has_no_known_beginning(tmp_path):
    store = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    data = rows(200, 1)
    done = train("naive_bayes", data[["note", "answer"]], "answer", targets={})
    register(log_run(done, data[["note", "answer"]], store=store), "m", store=store)
    store.set_registered_model_alias("m", "champion", "1")
    assert "since when was not recorded" in write_card("champion", name="m", store=store)
    with pytest.raises(RegistryError, match="No champion"):
        rollback("no", name="m", store=store)


# --- whatever the run ------------------------------------------------------------------------------------------------


def test_a_run_without_data_has_a_card_that_says_what_it_lacks(tmp_path):
    store = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    done = train("forest", rows(200, 1), "answer", targets={}, params={"n_estimators": 5, "shift": False})
    register(log_run(done, store=store), "m", store=store)
    text = write_card(1, name="m", store=store)
    assert text.count("The run did not keep this") == 2
    assert "5 trees" in text


def test_a_regression_has_intervals_of_its_errors_and_no_classes(tmp_path):
    store = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    data = pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2)).round(4), columns=["a", "b"])
    data["y"] = data.a * 3 + data.b
    done = train("ridge", data, "y", targets={"r2": 0.5})
    register(log_run(done, data, store=store), "price", store=store)
    card = make_card(1, "price", store=store)
    assert "predicts no classes" in card.text
    assert set(card.pictures) == {"importance.svg"}
    low, high = Facts(find(1, "price", store=store)).intervals["rmse"]
    assert low <= done.metrics["rmse"] <= high
    assert "0.5: reached" in card.text


@pytest.mark.parametrize("kind", ["histgb", "xgboost", "svm", "naive_bayes", "ordinal", "pytorch_cnn", "keras_bag"])
def test_every_kind_tells_what_is_inside(kind):
    params = {"xgboost": {"rounds": 6}, "histgb": {"max_iter": 6, "shift": False}}.get(kind, {"shift": False})
    if kind.startswith(("pytorch", "keras")):
        pytest.importorskip("torch" if kind.startswith("pytorch") else "tensorflow")
        params = {"epochs": 1, "width": 4, "min_count": 1}
    data = rows(160, 1)
    found = parts(train(kind, data.assign(answer=data.answer.str[:5]), "answer", targets={}, params=params).model)
    assert found[-1][2] or found[-2][2], f"the last part of {kind} has learnt something: {found}"
    if kind == "pytorch_cnn":
        layers = {where: size for where, _, size in found if "network" not in where}
        assert any("embedding" in where and size.endswith("weights") for where, size in layers.items())


@pytest.mark.parametrize(
    "damage",
    [
        {"classes": ["a"]},
        {"confusion": [[1, 2], [3]]},
        {"confusion": [[-1] * 3] * 3},
        {"training_classes": [1]},
        {"columns": {"note": {"missing": 7, "role": "text"}}},
        {"columns": {"note": "<b>"}},
        {"features": None},
        {"importance": {"a": "heavy"}},
    ],
)
def test_a_damaged_report_is_named(damage, world):
    store, _ = world
    version = find(2, "m", store=store)
    vars(version)["report"] = version.report | damage
    with pytest.raises(RegistryError, match=f"report.json of m 2 is damaged.*({next(iter(damage))}|do not fit)"):
        make_card(version)


def test_the_pictures_of_curves_are_valid_with_any_names():
    for curves in ({"a$b": [1.0, 0.5]}, {"train": [1.0, float("nan")], "validation_f1": [0.1, 0.2], "<x>": [3.0]}):
        ET.fromstring(curves_svg(curves))
    assert curves_svg({"a": [1.0]}) == curves_svg({"a": [1.0]}), "the same picture has the same bytes"


# --- files, declarations, checks -------------------------------------------------------------------------------------


def test_a_card_is_written_with_its_pictures_and_shows_them_in_a_notebook(world, tmp_path):
    store, _ = world
    text = write_card(3, tmp_path / "cards", name="m", store=store)
    assert (tmp_path / "cards" / "MODEL_CARD.md").read_text(encoding="utf-8") == text
    named = re.findall(r"\]\((MODEL_CARD_files/[^)]*)\)", text)
    assert len(named) == 4, "confusion, importance, learning curve, reliability"
    assert all((tmp_path / "cards" / name).is_file() for name in named)
    shown = make_card(3, "m", store=store)._repr_markdown_()
    assert "MODEL_CARD_files" not in shown
    assert shown.count("](data:image/svg+xml;base64,") == 4


def test_what_is_missing_is_named(world):
    store, _ = world
    name = f"declared-{np.random.default_rng().integers(1e9)}"
    register(find(2, "m", store=store).run_id, name, store=store)
    assert check_card(write_card(1, name=name, store=store)) == ["Intended use"]
    declare(name, store=store, **dict.fromkeys(DECLARED, EVIL))
    text = write_card(1, name=name, store=store)
    assert check_card(text) == []
    assert check_card("") == list(SECTIONS)
    assert check_card(re.sub(r"(?s)## Limits.*?## How", "## Limits\n\n–\n\n## How", text)) == ["Limits"]


def test_a_declaration_that_cannot_stand_is_refused(world):
    store, _ = world
    for told in ({"purpose": "x y z"}, {"contact": " "}, {"contact": "x" * 2001}):
        with pytest.raises(RegistryError, match="declare intended_use"):
            declare("m", store=store, **told)
    with pytest.raises(RegistryError, match="nobody"):
        declare("nobody", contact="somebody", store=store)


def test_a_version_that_is_not_there_has_no_card(world):
    store, _ = world
    with pytest.raises(RegistryError, match="no version '9'"):
        write_card(9, name="m", store=store)
    with pytest.raises(RegistryError, match="nobody"):
        write_card(name="nobody", store=store)


def test_a_model_that_cannot_be_read_is_said_on_the_card(world, monkeypatch):
    store, _ = world
    version = find(2, "m", store=store)
    monkeypatch.setattr(cards, "find", lambda *a, **k: version)
    vars(version)["report"] = version.report
    monkeypatch.setattr(
        "mlops_lib.registry.gates.load_model", lambda *a, **k: (_ for _ in ()).throw(RegistryError("<gone>"))
    )
    assert "The model could not be read: &#60;gone&#62;" in write_card(2, name="m", store=store)
