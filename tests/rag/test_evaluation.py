"""Measures against another way to them, labels against the lessons, loaders against what strangers send."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

import mlops_lib
from mlops_lib.rag import evaluation
from mlops_lib.rag.evaluation import (
    PARTS,
    QUESTIONS,
    Evaluation,
    EvaluationError,
    Question,
    Span,
    Text,
    answered_anyway,
    auroc,
    build_view,
    citation_accuracy,
    compare,
    course_documents,
    course_folder,
    course_index,
    course_questions,
    course_texts,
    evaluate,
    hit_at,
    interval,
    judge,
    load_beir,
    load_squad,
    ndcg_at,
    paired_bootstrap,
    recall_at,
    reciprocal_rank,
    threshold,
)

IDS = st.sampled_from("abcdefghij")
RANKED = st.lists(IDS, unique=True, max_size=10)
GRADED = st.dictionaries(IDS, st.integers(1, 5), min_size=1)
K = st.integers(1, 12)


@dataclass(frozen=True)
class Place:
    document: str
    start: int
    end: int
    text: str = ""
    score: float = 0.5


# ---- measures


@given(st.permutations("abcdefghij"), st.dictionaries(IDS, st.integers(0, 5)), st.integers(1, 10))
def test_ndcg_is_that_of_scikit_learn(order, grades, k):
    assume(any(grades.values()))
    truth, place = [grades.get(i, 0) for i in "abcdefghij"], [-order.index(i) for i in "abcdefghij"]
    assert ndcg_at(k, order, grades) == pytest.approx(ndcg_score([truth], [place], k=k))


@given(RANKED, GRADED, K)
def test_measures_stay_within_0_and_1_and_agree_on_nothing(ranked, grades, k):
    found = [ndcg_at(k, ranked, grades), recall_at(k, ranked, grades), hit_at(k, ranked, grades)]
    assert all(0 <= x <= 1 + 1e-12 for x in found) and 0 <= reciprocal_rank(ranked, grades) <= 1
    assert len({x > 0 for x in found}) == 1
    assert hit_at(k, ranked, grades) == (reciprocal_rank(ranked, grades) >= 1 / k)


@given(RANKED, GRADED, K)
def test_more_places_find_no_less(ranked, grades, k):
    assert recall_at(k + 1, ranked, grades) >= recall_at(k, ranked, grades)
    assert hit_at(k + 1, ranked, grades) >= hit_at(k, ranked, grades)


@given(st.lists(IDS, unique=True, min_size=2, max_size=10), GRADED, st.data())
def test_moving_the_better_one_up_never_hurts(ranked, grades, data):
    i = data.draw(st.integers(0, len(ranked) - 2))
    assume(grades.get(ranked[i + 1], 0) > grades.get(ranked[i], 0))
    better = [*ranked[:i], ranked[i + 1], ranked[i], *ranked[i + 2 :]]
    assert ndcg_at(10, better, grades) > ndcg_at(10, ranked, grades)
    assert reciprocal_rank(better, grades) >= reciprocal_rank(ranked, grades)


@given(GRADED, K)
def test_the_best_order_is_worth_1(grades, k):
    best = sorted(grades, key=grades.get, reverse=True)
    assert ndcg_at(k, best, grades) == pytest.approx(1) and reciprocal_rank(best, grades) == 1
    assert ndcg_at(len(best), best[::-1], set(grades)) == pytest.approx(1), "among equals the order is nothing"


def test_an_id_that_comes_again_gains_nothing():
    assert ndcg_at(3, "aab", {"a": 1, "b": 1}) == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))
    assert recall_at(2, "aa", {"a", "b"}) == 0.5


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3", None])
def test_k_is_a_whole_number(k):
    with pytest.raises(EvaluationError, match="k is a whole number"):
        ndcg_at(k, "a", {"a"}) if k is not None else evaluate(lambda q, k: [], [Question("1", "?")], ks=())


@pytest.mark.parametrize(("relevant", "said"), [
    ({}, "Nothing is relevant"), ({"a": 0}, "Nothing is relevant"), ({"a": -1}, "finite numbers"), ({"a": math.nan}, "finite numbers"),
])
def test_labels_that_cannot_be(relevant, said):
    for measure in (lambda: ndcg_at(3, "a", relevant), lambda: recall_at(3, "a", relevant), lambda: reciprocal_rank("a", relevant)):
        with pytest.raises(EvaluationError, match=said):
            measure()


SCORED = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=60)
SCORES = SCORED.filter(lambda rows: len({known for _, known in rows}) == 2)


@given(SCORES)
def test_auroc_is_that_of_scikit_learn(rows):
    scores, known = zip(*rows, strict=True)
    assert auroc(scores, known) == pytest.approx(roc_auc_score(known, scores))
    assert auroc([-s for s in scores], known) == pytest.approx(1 - auroc(scores, known))
    assert auroc([math.exp(s) for s in scores], known) == pytest.approx(auroc(scores, known)), "only the order counts"


@given(SCORES, st.floats(0.01, 1))
def test_the_threshold_covers_and_is_the_highest_that_does(rows, coverage):
    scores, known = (np.array(x) for x in zip(*rows, strict=True))
    at = threshold(scores, known, coverage)
    assert (scores[known] >= at).mean() >= coverage - 1e-9
    assert (scores[known] > at).mean() < coverage
    assert answered_anyway(scores, known, coverage) == (scores[~known] >= at).mean()


def test_what_no_score_is_found_for_ranks_below_all():
    assert auroc([-math.inf, 0.0, 0.1], [False, True, True]) == 1
    with pytest.raises(EvaluationError, match="NaN"):
        auroc([math.nan, 0.1], [True, False])
    with pytest.raises(EvaluationError, match="both kinds"):
        auroc([0.1, 0.2], [True, True])
    with pytest.raises(EvaluationError, match="Coverage"):
        threshold([0.1, 0.2], [True, False], coverage=0)


# ---- intervals


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 5))
def test_the_interval_holds_what_it_is_of(values, seed):
    found = interval(values, resamples=200, seed=seed)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found == interval(values, resamples=200, seed=seed), "the same draw for the same seed"
    assert interval(values, resamples=200, seed=seed, level=0.5).high <= found.high + 1e-12


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_a_difference_turned_round_is_its_negative(pairs):
    a, b = zip(*pairs, strict=True)
    one, other = paired_bootstrap(a, b, resamples=100), paired_bootstrap(b, a, resamples=100)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert paired_bootstrap(a, a, resamples=50) == (0, 0, 0)


def test_the_interval_is_as_wide_as_theory_says():
    x = np.random.default_rng(1).normal(0.3, 1.0, 2_000)
    found, error = interval(x), x.std() / math.sqrt(len(x))
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.15 * error)


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(7)
    found = [interval(rng.binomial(1, 0.3, 80), resamples=400, seed=n) for n in range(300)]
    assert 0.88 < np.mean([i.low <= 0.3 <= i.high for i in found]) <= 1


def test_drawing_in_blocks_bounds_the_memory_and_draws_all():
    assert interval(np.linspace(0, 1, 300_000), resamples=20).mean == pytest.approx(0.5)


@pytest.mark.parametrize(("values", "options", "said"), [
    ([], {}, "needs values"), ([math.nan], {}, "needs values"),
    ([1.0], {"resamples": 0}, "at least once"), ([1.0], {"level": 1}, "between 0 and 1"),
])
def test_no_interval_of_nothing(values, options, said):
    with pytest.raises(EvaluationError, match=said):
        interval(values, **options)


# ---- hits


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 100), st.integers(1, 60))
def test_half_of_the_shorter_is_enough(start, length, at, size):
    span, place = Span("d", start, start + length), Place("d", at, at + size)
    shared = len(set(range(start, start + length)) & set(range(at, at + size)))
    assert span.shown_by(place) == (shared >= min(length, size) / 2)
    assert not span.shown_by(Place("other", at, at + size))


def test_of_chunks_that_border_in_an_answer_at_least_one_shows_it():
    span = Span("d", 430, 620)
    for border in range(431, 620):
        assert span.shown_by(Place("d", border - 500, border)) or span.shown_by(Place("d", border - 50, border + 450))


def test_a_span_is_found_once():
    question = Question("1", "?", (Span("d", 0, 20), Span("d", 100, 120)))
    again = [Place("d", 0, 50), Place("d", 0, 60), Place("e", 0, 60), Place("d", 90, 130)]
    ranked, relevant = judge(again, question)
    assert [r in relevant for r in ranked] == [True, False, False, True] and len(relevant) == 2
    assert ndcg_at(4, ranked, relevant) == pytest.approx((1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3)))


def test_spans_of_one_chunk_count_as_one():
    question = Question("1", "?", (Span("d", 0, 20), Span("d", 30, 50)))
    ranked, relevant = judge([Place("d", 0, 100)], question)
    assert ndcg_at(5, ranked, relevant) == 1 and recall_at(1, ranked, relevant) == 1


PLACES = st.lists(st.builds(Place, st.sampled_from("de"), st.just(0), st.just(0)).flatmap(
    lambda p: st.integers(0, 200).map(lambda at: Place(p.document, at, at + 60))), max_size=8)


@given(PLACES, st.lists(st.integers(0, 240), min_size=1, max_size=5, unique=True), K)
def test_whatever_is_cut_measures_stay_within_0_and_1(places, starts, k):
    question = Question("1", "?", tuple(Span("d", s, s + 25) for s in starts))
    ranked, relevant = judge(places, question)
    assert 0 <= ndcg_at(k, ranked, relevant) <= 1 + 1e-12 and 0 <= recall_at(k, ranked, relevant) <= 1
    assert (recall_at(9, ranked, relevant) > 0) == any(s.shown_by(p) for s in question.spans for p in places)


def test_where_only_documents_are_known_a_document_counts_at_its_first_chunk():
    question = Question("1", "?", relevant={"d": 2, "e": 1})
    hits = [SimpleNamespace(chunk=Place("x", 0, 9)), Place("x", 9, 20), "d", Place("d", 5, 10), "e"]
    assert judge(hits, question) == (["x", "d", "e"], {"d": 2, "e": 1})
    with pytest.raises(EvaluationError, match="says no place"):
        judge(["d"], Question("1", "?", (Span("d", 0, 9),)))


# ---- evaluate


ASKED = [
    Question("1", "one", (Span("d", 0, 20),), group="a"),
    Question("2", "two", relevant={"e": 1}, group="b"),
    Question("3", "three", group="b"),
]
ANSWERS = {
    "one": [Place("d", 0, 30, score=0.9)],
    "two": [Place("d", 0, 9, score=0.4), Place("e", 0, 9)],
    "three": [Place("e", 0, 9, score=0.7)],
}


def test_every_question_has_a_row():
    seen = []
    found = evaluate(lambda q, k: seen.append(k) or ANSWERS[q], ASKED, ks=(5, 1, 5), name="it")
    assert seen == [5, 5, 5] and found.ks == (1, 5) and list(found.rows.index) == ["1", "2", "3"]
    assert found.rows["mrr"].tolist()[:2] == [1, 0.5] and math.isnan(found.rows.loc["3", "mrr"])
    assert found.means["hit@1"] == 0.5 and found.means["recall@5"] == 1
    assert found.means["auroc"] == 0.5 and found.means["near misses answered"] == 1
    assert json.loads(json.dumps(found.means)), "plain numbers"


def test_no_hits_are_no_error_and_no_confidence():
    found = evaluate(lambda q, k: [] if q == "three" else ANSWERS[q], ASKED)
    assert found.means["auroc"] == 1 and found.means["near misses answered"] == 0
    assert evaluate(lambda q, k: iter(()), ASKED).means["ndcg@10"] == 0


def test_more_hits_than_asked_for_do_not_count_and_need_not_end():
    def endless(q, k):
        while True:
            yield Place("x", 0, 9)

    assert evaluate(endless, ASKED).means["hit@10"] == 0


def test_another_score_may_say_how_sure_a_search_is():
    found = evaluate(lambda q, k: ANSWERS[q], ASKED, score=lambda hits: -len(hits))
    assert found.rows["score"].tolist() == [-1, -2, -1]
    without = evaluate(lambda q, k: [SimpleNamespace(document="e", start=0, end=9)], ASKED)
    assert "auroc" not in without.means


def test_what_a_search_raises_names_the_question():
    def broken(q, k):
        raise ConnectionError("the server is away")

    with pytest.raises(ConnectionError) as e:
        evaluate(broken, ASKED)
    assert "question '1'" in e.value.__notes__[0]


def test_questions_that_cannot_be_asked():
    with pytest.raises(EvaluationError, match="nothing to ask"):
        evaluate(lambda q, k: [], [])
    with pytest.raises(EvaluationError, match="same id"):
        evaluate(lambda q, k: [], [ASKED[0], ASKED[0]])


def test_only_near_misses_have_no_means():
    assert evaluate(lambda q, k: [], ASKED[2:]).means.keys() == {"ms"}


def test_a_comparison_pairs_questions_in_any_order():
    right = evaluate(lambda q, k: ANSWERS[q], ASKED, name="right")
    none = evaluate(lambda q, k: [], ASKED[::-1], name="none")
    found = compare(right, none, ["ndcg@10", "mrr"], resamples=500, seed=3)
    assert found.loc["mrr", "a - b"] == 0.75 and found.loc["mrr", "low"] >= 0.5 and list(found.index) == ["ndcg@10", "mrr"]
    assert (compare(right, right)["high"] == 0).all()
    with pytest.raises(EvaluationError, match="different questions"):
        compare(right, evaluate(lambda q, k: [], ASKED[:2]))
    with pytest.raises(EvaluationError, match="ndcg@7"):
        compare(right, none, ["ndcg@7"])


def test_a_name_has_no_power_over_the_page():
    found = evaluate(lambda q, k: ANSWERS[q], ASKED, name="<script>x</script> | *y*\n# z")
    assert "<script>" not in found._repr_html_() and "<script>" not in found._repr_markdown_().replace("\\<", "")
    assert "\n#" not in found._repr_markdown_() and "ndcg@10" in found._repr_markdown_()
    lines = [line for line in found._repr_markdown_().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {4}


# ---- citations


def test_a_citation_holds_its_text_in_a_place_that_answers():
    texts = {"d": "Nothing here. The box is\n  blue, they say."}
    question = Question("1", "?", (Span("d", 14, 32),))
    right = Place("d", 14, 33, "The box is blue,")
    wrong = [Place("d", 0, 13, "Nothing here."), Place("d", 14, 33, "The box is red,"), Place("gone", 14, 33, "The box is blue,"),
             Place("d", 14, 33, " "), Place("d", 1_000, 2_000, "The box is blue,"), Place("d", -5, 3, "Not")]  # fmt: skip
    assert citation_accuracy([right], question, texts) == 1
    assert [citation_accuracy([w], question, texts) for w in wrong] == [0] * len(wrong)
    assert citation_accuracy([right, wrong[0]], question, texts) == 0.5
    assert math.isnan(citation_accuracy([], question, texts))
    assert citation_accuracy([Place("d", 0, 13, "Nothing here.")], Question("1", "?", relevant={"d": 1}), texts) == 1
    assert citation_accuracy([right], Question("1", "?"), texts) == 0, "whoever cites where there is nothing is wrong"


# ---- the questions about the course


@pytest.fixture(scope="module")
def texts():
    return course_texts()


@pytest.fixture(scope="module")
def labels():
    return [json.loads(line) for line in (course_folder() / QUESTIONS).read_text(encoding="utf-8").splitlines()]


def test_every_quotation_stands_in_its_lesson(labels, texts):
    missing = [(r["id"], a["lesson"], a["quote"]) for r in labels for a in r["answers"] if a["quote"] not in texts.get(a["lesson"], "")]
    assert not missing, f"quote the lesson as it is now: {missing[:3]}"
    assert all(30 <= len(a["quote"]) <= 300 for r in labels for a in r["answers"])


def test_there_are_enough_of_each_kind(labels):
    near, answered = [r for r in labels if not r["answers"]], [r for r in labels if r["answers"]]
    assert len(labels) >= 120 and len(near) >= 30
    assert len({r["id"] for r in labels}) == len({r["question"].lower() for r in labels}) == len(labels)
    for rows in (near, answered):
        split = Counter(r["split"] for r in rows)
        assert set(split) == {"tune", "test"} and abs(split["tune"] - split["test"]) <= 1
        for part in PARTS:
            of = Counter(r["split"] for r in rows if r["part"] == part)
            assert of and abs(of["tune"] - of["test"]) <= 1, f"part {part} is not divided evenly"
    asked = Counter(r["near"] for r in answered)
    lessons = course_documents()
    few = [lesson for lesson in lessons if asked[lesson] < 2]
    assert len(few) <= len(lessons) / 10, f"write questions for the new lessons: {few}"
    assert all(r["near"] in course_documents() and r["part"] == int(r["near"][0]) for r in labels)


def test_questions_are_not_copies_of_their_answers(labels):
    words = lambda text: re.findall(r"\w+", text.lower())
    for row in labels:
        asked = words(row["question"])
        for answer in row["answers"]:
            quoted = " ".join(words(answer["quote"]))
            runs = [" ".join(asked[i : i + 6]) for i in range(len(asked) - 5)]
            assert not any(run in quoted for run in runs), row["id"]


def test_labels_become_places(labels, texts):
    found = {q.id: q for q in course_questions(texts)}
    assert set(found) == {r["id"] for r in labels}
    for row in labels:
        quotes = {a["quote"] for a in row["answers"]}
        assert {texts[s.document][s.start : s.end] for s in found[row["id"]].spans} == quotes
        assert found[row["id"]].answerable == bool(quotes)
    halves = [{q.id for q in course_questions(texts, split)} for split in ("tune", "test")]
    assert halves[0] | halves[1] == set(found) and not halves[0] & halves[1]


def test_of_some_lessons_come_their_questions(texts):
    one = "4_events/49_kafka.ipynb"
    found = course_questions({one: texts[one]})
    assert {s.document for q in found for s in q.spans} == {one} and any(not q.answerable for q in found)
    assert course_questions({}) == []
    with pytest.raises(EvaluationError, match="'train'"):
        course_questions(texts, "train")


def test_outside_of_a_checkout_it_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert course_folder().name == "notebooks", "the library knows where it was checked out"
    monkeypatch.setattr(mlops_lib, "__file__", str(tmp_path / "site-packages" / "mlops_lib" / "__init__.py"))
    with pytest.raises(EvaluationError, match="come with a checkout"):
        course_folder()


def lesson(text):
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": [text]}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_the_index_of_the_course_follows_its_lessons(monkeypatch, tmp_path):
    notebooks = tmp_path / "notebooks"
    for name in ("0_start/00_one", "0_start/01_two", "6_rag/60_three"):
        (notebooks / name).parent.mkdir(parents=True, exist_ok=True)
        (notebooks / f"{name}.ipynb").write_text(lesson(f"# {name}\n\nThe parcel is in {name}."))
    (notebooks / QUESTIONS).write_text("")
    (tmp_path / "settings.ini").write_text("")
    monkeypatch.chdir(tmp_path)
    assert list(course_documents()) == ["0_start/00_one.ipynb", "0_start/01_two.ipynb"]
    with course_index(folder=tmp_path / "index") as index:
        before = index.view()
        assert {d["id"] for d in index.documents()} == {*course_documents(None)} and len(course_documents(None)) == 3
        assert len(index.view({"part": {"$in": list(PARTS)}}).chunks) == len(before.chunks) - 1
        assert index.text("0_start/00_one.ipynb") == course_texts()["0_start/00_one.ipynb"]
    with course_index(folder=tmp_path / "index") as index:
        assert index.view().version == before.version, "nothing changed, nothing was written"
    (notebooks / "0_start/00_one.ipynb").write_text(lesson("# One\n\nThe parcel has gone."))
    (notebooks / "0_start/01_two.ipynb").unlink()
    with course_index(folder=tmp_path / "index") as index:
        assert {d["id"] for d in index.documents()} == {"0_start/00_one.ipynb", "6_rag/60_three.ipynb"}
        assert "gone" in index.text("0_start/00_one.ipynb")


# ---- data of others


def beir(folder, corpus=None, queries=None, qrels=None):
    (folder / "qrels").mkdir(exist_ok=True)
    corpus = ['{"_id": "d1", "title": "T", "text": "one"}', '{"_id": "d2", "text": "two"}'] if corpus is None else corpus
    queries = ['{"_id": "q1", "text": "first?"}', '{"_id": "q2", "text": "second?"}'] if queries is None else queries
    qrels = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t1", "q2\td2\t1"] if qrels is None else qrels
    for name, lines in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels/test.tsv", qrels)):
        (folder / name).write_bytes(lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode())
    return folder


def test_beir_is_read(tmp_path):
    found = load_beir(beir(tmp_path))
    asked = [(q.id, q.text, dict(q.relevant)) for q in found.questions]
    assert asked == [("q1", "first?", {"d1": 2, "d2": 1}), ("q2", "second?", {"d2": 1})]
    assert list(found.documents()) == list(found.documents()) == [("d1", "T", "T\n\none"), ("d2", "", "two")]
    assert found.problems == [] and found.left_out == 0
    assert evaluate(lambda q, k: ["d1", "d2"], found.questions).means["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_a_mark_blank_lines_and_windows_ends_are_no_error(tmp_path):
    found = load_beir(beir(tmp_path, corpus=b'\xef\xbb\xbf{"_id": "d1", "text": "one"}\r\n\r\n{"_id": "d2", "text": "two"}'))
    assert [d.id for d in found.documents()] == ["d1", "d2"]


def test_labels_that_point_nowhere_are_reported(tmp_path):
    found = load_beir(beir(tmp_path, qrels=["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td9\t1", "q8\td1\t1", "q2\td1\t0"]))
    assert [q.id for q in found.questions] == ["q1"] and dict(found.questions[0].relevant) == {"d1": 1}
    said = "\n".join(found.problems)
    for problem in ("line 3: there is no 'd9' in corpus.jsonl", "line 4: there is no 'q8' in queries.jsonl", "'q2' has no relevant"):
        assert problem in said
    assert found.left_out == len(found.problems) == 3


def test_problems_are_counted_and_not_all_kept(tmp_path):
    found = load_beir(beir(tmp_path, qrels=["query-id\tcorpus-id\tscore", "q1\td1\t1", *(f"q1\tx{n}\t1" for n in range(500))]))
    assert found.left_out == 500 and len(found.problems) == evaluation.KEPT


@pytest.mark.parametrize(("wrong", "said"), [
    ({"corpus": ['{"_id": "d1", "text": "one"}', '{"_id": "d1", "text": "two"}']}, r"corpus.jsonl, line 2: the _id 'd1' is there"),
    ({"corpus": ['{"_id": "", "text": "one"}']}, r"corpus.jsonl, line 1: the _id '' is empty"),
    ({"corpus": ['{"_id": "d1", "text": "one"}', "{"]}, r"corpus.jsonl, line 2: it is no JSON"),
    ({"corpus": ['{"_id": "d1", "text": "one"}', "[" * 100_000]}, r"corpus.jsonl, line 2: it is no JSON"),
    ({"corpus": ['["d1", "one"]']}, r"corpus.jsonl, line 1: an object with _id, text is expected, not list"),
    ({"corpus": ['{"_id": "d1", "body": "one"}']}, r"line 1: 'text' should be of type str, and is missing; there are \['_id', 'body'\]"),
    ({"corpus": ['{"_id": 7, "text": "one"}']}, r"corpus.jsonl, line 1: '_id' should be of type str, and is 7"),
    ({"corpus": ['{"_id": "d1", "text": "one", "title": 3}']}, r"corpus.jsonl, line 1: 'title'"),
    ({"corpus": b'{"_id": "d1", "text": "caf\xe9"}\n'}, r"corpus.jsonl, line 1: byte 26 is no UTF-8"),
    ({"queries": ['{"_id": "q1"}']}, r"queries.jsonl, line 1: 'text'"),
    ({"queries": ['{"_id": "q1", "text": "a"}'] * 2}, r"queries.jsonl, line 2: the _id 'q1'"),
    ({"qrels": ["q1\td1\t1"]}, r"test.tsv, line 1: three columns divided by tabs, headed query-id"),
    ({"qrels": ["query-id\tcorpus-id\tscore", "q1\td1"]}, r"test.tsv, line 2: three columns"),
    ({"qrels": ["query-id\tcorpus-id\tscore", "q1 d1 1"]}, r"test.tsv, line 2: three columns"),
    ({"qrels": ["query-id\tcorpus-id\tscore", "q1\td1\tyes"]}, r"test.tsv, line 2: the score is a finite number, not 'yes'"),
    ({"qrels": ["query-id\tcorpus-id\tscore", "q1\td1\tinf"]}, r"test.tsv, line 2: the score is a finite number"),
    ({"qrels": ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td1\t0"]}, r"test.tsv, line 3: the pair 'q1', 'd1' is there a second time"),
    ({"qrels": ["query-id\tcorpus-id\tscore", "q1\td9\t1"]}, r"no question of 'test' has a relevant document.*no 'd9'"),
    ({"qrels": []}, r"no question of 'test' has a relevant document"),
])
def test_a_broken_form_stops_with_file_and_line(tmp_path, wrong, said):
    with pytest.raises(EvaluationError, match=said):
        load_beir(beir(tmp_path, **wrong))


def test_missing_files_and_huge_lines(tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="There is no file .*corpus.jsonl"):
        load_beir(tmp_path)
    beir(tmp_path)
    with pytest.raises(EvaluationError, match="There is no file .*dev.tsv"):
        load_beir(tmp_path, split="dev")
    (tmp_path / "long.jsonl").write_bytes(b"{}\n" + b"x" * 2_000)
    with pytest.raises(EvaluationError, match=r"long.jsonl, line 2: it is longer than 1,000 bytes"):
        list(evaluation._lines(tmp_path / "long.jsonl", limit=1_000))


CONTEXT = "Amber is resin. 🟠 It washes ashore."


def squad(folder, *qas, context=CONTEXT, **more):
    file = folder / "set.json"
    article = {"title": "Amber", "paragraphs": [{"context": context, "qas": list(qas)}]}
    file.write_text(json.dumps({"version": "v2.0", "data": [article]} | more))
    return file


def qa(id="1", answers=(("resin", 9),), **more):
    return {"id": id, "question": "What?", "answers": [{"text": t, "answer_start": s} for t, s in answers]} | more


def test_squad_is_read(tmp_path):
    found = load_squad(squad(tmp_path, qa("1", [("resin", 9), ("is resin", 6), ("ashore", 28)]), qa("2", [], is_impossible=True)))
    assert list(found.documents()) == list(found.documents()) == [("0/0", "Amber", CONTEXT)]
    assert [CONTEXT[s.start : s.end] for s in found.questions[0].spans] == ["resin", "ashore"], "the same answer once, in characters"
    assert [q.answerable for q in found.questions] == [True, False] and found.left_out == 0
    assert evaluate(lambda q, k: [Place("0/0", 0, 16)], found.questions).means["hit@1"] == 1


def test_an_impossible_question_may_have_plausible_answers(tmp_path):
    found = load_squad(squad(tmp_path, qa("1", [("resin", 9)], is_impossible=True)))
    assert not found.questions[0].answerable


@pytest.mark.parametrize("start", [8, -1, 10_000])
def test_an_offset_that_does_not_match_is_reported(tmp_path, start):
    found = load_squad(squad(tmp_path, qa("1"), qa("2", [("resin", start)]), qa("3", [("resin", start), ("resin", 9)]), qa("4", [])))
    assert [q.id for q in found.questions] == ["1", "3"], "an answer that is wrong is left out, its question only if no other is right"
    assert found.left_out == 4 and "qas[1].answers[0]: at" in found.problems[0] and "not 'resin'" in found.problems[0]


@pytest.mark.parametrize(("qas", "more", "said"), [
    ([qa("1"), qa("1")], {}, r"paragraphs\[0\].qas\[1\]: the id '1' is there a second time"),
    ([{"id": "1", "question": "What?"}], {}, r"qas\[0\]: 'answers' should be of type list, and is missing"),
    ([qa("1", answers=()) | {"answers": [{"text": "resin"}]}], {}, r"answers\[0\]: 'answer_start'"),
    ([qa("1") | {"answers": [{"text": "resin", "answer_start": True}]}], {}, r"'answer_start' should be of type int, and is True"),
    ([qa("1") | {"question": None}], {}, r"qas\[0\]: 'question'"),
    (["what?"], {}, r"qas\[0\]: an object with id"),
    ([qa("1", [("gone", 0)])], {}, r"no question that could be asked.*stands 'Ambe', not 'gone'"),
    ([], {"data": "no list"}, r"set.json: 'data' should be of type list"),
    ([], {"data": [{"title": "x"}]}, r"data\[0\]: 'paragraphs'"),
    ([], {"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\]: 'context'"),
    ([], {"data": []}, "no question that could be asked"),
])
def test_a_broken_squad_says_where(tmp_path, qas, more, said):
    with pytest.raises(EvaluationError, match=said):
        load_squad(squad(tmp_path, *qas, **more))


def test_a_file_that_is_no_squad(tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="There is no file"):
        load_squad(tmp_path / "none.json")
    for content, said in ((b"{", "no JSON"), (b"\xff\xfe{", "no UTF-8"), (b"[]", "not list"), (b"[" * 200_000, "no JSON")):
        (tmp_path / "set.json").write_bytes(content)
        with pytest.raises(EvaluationError, match=said):
            load_squad(tmp_path / "set.json")
    monkeypatch.setattr(evaluation, "MAX_FILE", 10)
    with pytest.raises(EvaluationError, match="more than 10 bytes"):
        load_squad(squad(tmp_path, qa()))


def test_documents_can_be_searched_without_a_place_on_the_disk():
    texts = [Text("d1", "", "The parcel came late."), Text("d2", "T", "  "), Text("d3", "", "One sentence. " * 50)]
    whole, cut = build_view(iter(texts)), build_view(texts, size=100)
    assert [c.document for c in whole.chunks] == ["d1", "d3"], "a blank document has no chunk"
    assert len(cut.chunks) > 5 and all(c.text == {d.id: d.text for d in texts}[c.document][c.start : c.end] for c in cut.chunks)
    assert np.allclose(np.linalg.norm(cut.vectors, axis=1), 1, atol=1e-3) and len({c.id for c in cut.chunks}) == len(cut.chunks)
    assert whole.version == build_view(texts).version != build_view(texts[:1]).version
    with pytest.raises(EvaluationError, match="no text"):
        build_view([Text("d", "", "")])


def test_an_evaluation_shows_itself():
    rows = pd.DataFrame([{"id": "1", "question": "?", "split": "test", "group": "", "answerable": True, "seconds": 0.002, "score": 0.1,
                          "ndcg@1": 1.0, "recall@1": 1.0, "hit@1": 1.0, "mrr": 1.0}]).set_index("id")  # fmt: skip
    shown = Evaluation("one", (1,), rows)
    assert "| ndcg@1 | 1.000 | 1.000 to 1.000 |" in shown._repr_markdown_() and "1.000 to 1.000" in shown._repr_html_()
