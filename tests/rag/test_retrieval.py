"""Scores are similarities in the order of the hits, a filter and a larger k change nothing else, and what cannot be searched is refused."""

import gc
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import bm25s
import numpy as np
import pytest
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.data.embedding import Tokens, embed, embed_tokens
from mlops_lib.rag import retrieval as r
from mlops_lib.rag.index import Chunk, Index, IndexingError, View
from mlops_lib.rag.retrieval import (
    ALPHA,
    MAX_DIVERSE,
    MAX_QUERY,
    MODES,
    RERANK,
    Hits,
    Lexicon,
    RetrievalError,
    best,
    cosines,
    diverse,
    expand,
    late_interaction,
    lexicon_of,
    move,
    nearest,
    reciprocal_ranks,
    search,
    terms,
    variations,
)

WORDS = ["lease", "queue", "broker", "model", "train", "score", "message", "stars", "café", "naïve", "数据", "filter", "exam", "drift"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
COLLECTIONS = st.lists(TEXTS, min_size=1, max_size=25)
SCORES = st.integers(0, 4).map(lambda n: n / 4)
WHICH = st.sampled_from(MODES)


def fake(texts: Iterable[str]) -> np.ndarray:
    "Vectors that texts share as far as they share words, without running a network."
    word = lambda w: np.random.default_rng(list(w.encode())).normal(size=16)
    rows = [sum(map(word, text.lower().split()), np.zeros(16)) + 1e-9 for text in texts]
    return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


def view_of(texts: list[str], ids: list[str] | None = None) -> View:
    names = ids or [f"c{n:03d}" for n in range(len(texts))]
    chunks = [Chunk(i, f"d{n % 3}", t, 0, len(t), {"even": n % 2 == 0, "n": n}) for n, (i, t) in enumerate(zip(names, texts, strict=True))]
    return View("v", chunks, fake(texts).reshape(-1, 16))


def pairs(hits: Hits) -> list[tuple[str, float]]:
    return [(hit.chunk.id, hit.score) for hit in hits]


laws = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def without_a_network() -> Iterable[None]:
    "hypothesis runs a test many times in one fixture, so the laws patch once for the module."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r, "embed", fake)
        yield


# ---- laws


@laws
@given(COLLECTIONS, TEXTS, WHICH, st.sampled_from(r.FUSIONS), st.integers(1, 30))
def test_scores_are_similarities_in_the_order_of_the_hits(texts, query, mode, fusion, k):
    hits = search(view_of(texts), query, k, mode, fusion=fusion)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert all(type(s) is float and 0 <= s <= 1 for s in scores)
    assert len({hit.chunk.id for hit in hits}) == len(hits) <= k
    if mode != "bm25":
        assert len(hits) == min(k, len(texts))


@laws
@given(COLLECTIONS, TEXTS, WHICH, st.sampled_from(r.FUSIONS), st.integers(1, 12), st.integers(1, 30))
def test_a_longer_list_begins_with_the_shorter_one(texts, query, mode, fusion, k, more):
    view = view_of(texts)
    short, long = (pairs(search(view, query, n, mode, fusion=fusion)) for n in (k, k + more))
    assert long[: len(short)] == short


@laws
@given(COLLECTIONS, TEXTS, st.sampled_from(("dense", "bm25", "hybrid")), st.integers(0, 12))
def test_a_filter_leaves_out_and_changes_nothing_else(texts, query, mode, least):
    view = view_of(texts)
    where = {"$and": [{"n": {"$gte": least}}, {"even": True}]}
    hits = search(view, query, 100, mode)
    wanted = pairs(Hits(hit for hit in hits if hit.chunk.metadata["n"] >= least and hit.chunk.metadata["even"]))
    assert pairs(search(view, query, 100, mode, where=where)) == wanted
    assert pairs(search(view.take(np.flatnonzero([n >= least and n % 2 == 0 for n in range(len(texts))])), query, 100, mode)) == wanted


@laws
@given(COLLECTIONS, TEXTS, st.integers(0, 12))
def test_a_filter_of_multi_gives_a_subset(texts, query, least):
    hits = search(view_of(texts), query, 100, "multi", where={"n": {"$gte": least}})
    assert all(hit.chunk.metadata["n"] >= least for hit in hits)
    assert len(hits) == max(0, len(texts) - least)


@laws
@given(COLLECTIONS, TEXTS, st.lists(TEXTS, min_size=1, max_size=5))
def test_other_chunks_do_not_change_a_chunks_similarity(texts, query, others):
    alone = {hit.chunk.text: hit.score for hit in search(view_of(texts), query, 100, "dense")}
    together = {hit.chunk.text: hit.score for hit in search(view_of(others + texts), query, 100, "dense")}
    assert {text: together[text] for text in alone} == alone


@laws
@given(COLLECTIONS, TEXTS, WHICH, st.sampled_from(r.FUSIONS), st.randoms(use_true_random=False))
def test_the_order_of_the_chunks_does_not_matter(texts, query, mode, fusion, random):
    names = [f"c{n:03d}" for n in range(len(texts))]
    shuffled = random.sample(list(zip(texts, names, strict=True)), len(texts))
    other = view_of([t for t, _ in shuffled], [i for _, i in shuffled])
    first, second = (search(v, query, 100, mode, fusion=fusion) for v in (view_of(texts), other))
    assert [i for i, _ in pairs(first)] == [i for i, _ in pairs(second)]
    assert np.allclose([s for _, s in pairs(first)], [s for _, s in pairs(second)], atol=1e-6)


@laws
@given(
    st.lists(st.lists(SCORES, min_size=6, max_size=6).map(np.array), min_size=1, max_size=4),
    st.permutations(range(6)),
    st.randoms(use_true_random=False),
)
def test_rank_fusion_sees_places_only(lists, order, random):
    fused = reciprocal_ranks(lists)
    assert ((fused >= 0) & (fused <= 1)).all()
    assert np.array_equal(reciprocal_ranks(random.sample(lists, len(lists))), fused), "the order of the lists"
    assert np.array_equal(reciprocal_ranks([s[list(order)] for s in lists]), fused[list(order)]), "the order of the chunks"
    assert np.allclose(reciprocal_ranks([s**3 * 0.5 for s in lists]), fused), "the size of the scores"


def test_rank_fusion_by_hand():
    first, second = np.array([0.9, 0.5, 0.5, 0.0]), np.array([0.2, 0.8, 0.0, 0.0])
    wanted = [(1 / 61 + 1 / 62) / (2 / 61), (1 / 62 + 1 / 61) / (2 / 61), (1 / 62) / (2 / 61), 0.0]
    assert np.allclose(reciprocal_ranks([first, second]), wanted)


@laws
@given(st.lists(SCORES, min_size=1, max_size=30).map(np.array), st.integers(1, 40))
def test_best_is_a_sort(scores, k):
    places, found = best(scores, k, lambda n: f"{n:03d}")
    wanted = sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:k]
    assert places.tolist() == wanted
    assert found.tolist() == [scores[n] for n in wanted]


# ---- meaning


def test_nearest_is_what_comparing_with_each_gives():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    view = View("v", [Chunk(f"{n:04d}", "d", "x", 0, 1) for n in range(500)], vectors)
    places, similarity = nearest(view, vectors[7], 20)
    wanted = np.argsort(-(vectors.astype(float) @ vectors[7].astype(float)))[:20]
    assert places.tolist() == wanted.tolist()
    assert places[0] == 7
    assert similarity[0] == pytest.approx(1, abs=1e-6)


def test_copies_come_in_the_order_of_their_ids_wherever_they_stand():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(301, 16)).astype(np.float32)
    vectors[[3, 150, 300]] = vectors[3]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"x{n}" for n in range(301)]
    ids[3], ids[150], ids[300] = "c", "a", "b"
    view = View("v", [Chunk(i, "d", "x", 0, 1) for i in ids], vectors)
    places, similarity = nearest(view, fake(["lease"])[0], 301)
    copies = [p for p in places.tolist() if p in (3, 150, 300)]
    assert copies == [150, 300, 3]
    assert len({similarity[places.tolist().index(p)] for p in copies}) == 1


def test_what_points_away_is_not_similar():
    assert cosines(np.array([[1, 0], [-1, 0], [0, 1]], np.float32), np.array([1, 0], np.float32)).tolist() == [1, 0, 0]


# ---- words


def test_words_are_ranked_as_by_bm25s():
    texts = ["the lease of a consumer", "leases and more leases: leasing", "a broker", "the consumer holds the lease it leased", "stars"]
    lexicon, model = Lexicon(view_of(texts).chunks), bm25s.BM25()
    coded = bm25s.tokenize(texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False, return_ids=False)
    model.index(coded, show_progress=False)
    wanted = terms("leased consumers")
    assert wanted == ["leas", "consum"]
    ours, theirs = lexicon.scores(wanted), model.get_scores(wanted)
    assert np.allclose(ours, theirs / sum(lexicon.idf(t) for t in wanted))
    assert ours[2] == ours[4] == 0


@laws
@given(COLLECTIONS, TEXTS)
def test_no_chunk_reaches_the_words_whole_weight(texts, query):
    lexicon = Lexicon(view_of(texts).chunks)
    scores = lexicon.scores(terms(query))
    assert ((scores >= 0) & (scores <= 1)).all()
    weights = dict.fromkeys(terms(query), 0.3)
    assert np.allclose(lexicon.scores(weights), scores), "weights in proportion"


def test_a_word_that_is_nowhere_lowers_the_score():
    lexicon = Lexicon(view_of(["lease", "queue", "lease queue"]).chunks)
    assert lexicon.scores(["leas", "unheard"]).max() < lexicon.scores(["leas"]).max()


@pytest.mark.parametrize("texts", [["。。。", "!?"], ["the and of"], ["数据", "a"]])
def test_chunks_without_any_word(texts):
    view = view_of(texts)
    assert search(view, "lease", mode="bm25") == []
    assert len(search(view, "lease", mode="hybrid")) == len(texts)
    assert len(search(view, "lease", mode="multi")) == len(texts)


def test_the_lexicon_is_made_once_and_goes_with_its_view(monkeypatch):
    made = []
    monkeypatch.setattr(r, "Lexicon", lambda chunks: made.append(1) or Lexicon(chunks))
    view = view_of(["lease", "queue"])
    with ThreadPoolExecutor(4) as pool:
        lexicons = list(pool.map(lexicon_of, [view] * 8))
    assert len(made) == len({id(x) for x in lexicons}) == 1
    search(view.take(np.array([1])), "queue", mode="bm25")
    assert len(made) == 1, "a filtered view uses the whole one's"
    gone = weakref.ref(view)
    view = None
    del lexicons
    gc.collect()
    assert gone() is None


# ---- ways to ask


def test_variations_are_keywords_and_parts():
    found = variations("What is a lease, and how does a broker keep its messages?")
    assert found == ["lease broker keep its messages", "how does a broker keep its messages"]
    assert variations("lease broker") == []
    assert variations("who is it") == []


@laws
@given(st.text(min_size=1, max_size=200).filter(str.strip), st.lists(st.text(max_size=30), max_size=20))
def test_variations_are_bounded_and_differ(query, added):
    found = variations(r.clean_query(query), lambda _: added)
    folded = [text.casefold() for text in found]
    assert len(found) <= r.MAX_VARIATIONS
    assert len(set(folded)) == len(folded)
    assert r.clean_query(query).casefold() not in folded
    assert all(text.strip() for text in found)


def test_vary_is_asked_and_used():
    view, seen = view_of(["lease queue", "drift exam", "model score"]), []
    plain = search(view, "lease", 3, "multi")
    varied = search(view, "lease", 3, "multi", vary=lambda q: seen.append(q) or ["drift exam"])
    assert seen == ["lease"]
    score = lambda hits: {hit.chunk.text: hit.score for hit in hits}["drift exam"]
    assert score(varied) > score(plain) + 0.1
    assert "variation" in varied[0].why
    assert "variation" not in plain[0].why
    assert pairs(search(view, "lease", 3, "multi", vary=lambda q: [])) == pairs(plain)


@pytest.mark.parametrize("answer", ["one text", 7, None, [1], ["ok", None]])
def test_vary_gives_texts(answer):
    with pytest.raises(RetrievalError, match="`vary` gives a list of texts"):
        search(view_of(["lease"]), "lease", mode="multi", vary=lambda q: answer)


def test_feedback_moves_towards_the_first_answers():
    vector, near = np.array([1, 0], np.float32), np.array([[0, 1], [0, 1]], np.float32)
    assert np.allclose(move(vector, near), np.array([1, 0.4]) / np.hypot(1, 0.4))
    lexicon = Lexicon(view_of(["lease owner", "lease consumer owner", "stars", "model"]).chunks)
    weights = expand(["leas"], ["lease owner", "lease consumer owner"], [0.9, 0.8], lexicon, count=2)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["leas"] >= 0.8
    assert "owner" in weights
    assert expand(["leas"], [], [], lexicon) == {"leas": 0.8}
    assert sum(expand([], ["lease"], [1.0], lexicon).values()) == pytest.approx(0.2)


# ---- word by word


def test_late_interaction_by_hand():
    tokens = lambda words, rows: Tokens(words.split(), np.array(rows, np.float32))
    question = tokens("a b", [[1, 0], [0, 1]])
    assert late_interaction(question, tokens("a", [[1, 0]])) == pytest.approx(0.5)
    assert late_interaction(question, tokens("x a", [[0.6, 0.8], [1, 0]])) == pytest.approx(0.9)
    assert late_interaction(question, tokens("a", [[1, 0]]), lambda word: float(word == "a")) == pytest.approx(1)
    assert late_interaction(question, tokens("a", [[1, 0]]), lambda word: 0.0) == pytest.approx(0.5), "no word counts: all count alike"
    assert late_interaction(question, tokens("a", [[-1, 0]])) == 0
    assert late_interaction(question, Tokens([], np.zeros((0, 2), np.float32))) == 0


def test_the_second_look_reorders_the_first_twenty_only():
    texts = [f"{WORDS[n % 8]} {WORDS[(n * 5 + 1) % 8]} {n}" for n in range(RERANK + 10)]
    view = view_of(texts)
    plain, again = search(view, "who holds the lease of a message", 30), search(view, "who holds the lease of a message", 30, rerank=True)
    ids = lambda hits: [hit.chunk.id for hit in hits]
    assert set(ids(again)[:RERANK]) == set(ids(plain)[:RERANK])
    assert ids(again) != ids(plain)
    assert ids(again)[RERANK:] == ids(plain)[RERANK:]
    scores = [hit.score for hit in again]
    assert scores == sorted(scores, reverse=True)
    assert [hit.why["rerank"]["rank"] for hit in again[:RERANK]] == list(range(1, RERANK + 1))
    assert "rerank" not in again[RERANK].why
    assert pairs(search(view, "who holds the lease of a message", 3, rerank=True)) == pairs(again)[:3]


def test_the_second_look_is_what_the_tokens_say():
    view = view_of(["The lease belongs to one consumer.", "Stars are numbers."])
    hit = search(view, "lease", 1, "bm25", rerank=True)[0]
    question, text = embed_tokens(["lease", hit.chunk.text])
    assert hit.why["rerank"]["score"] == pytest.approx(late_interaction(question, text), abs=2e-3)
    assert hit.score == pytest.approx((hit.why["rerank"]["score"] + hit.why["bm25"]["score"]) / 2)


# ---- variety


def test_variety_passes_over_copies():
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 2]]
    similarity = np.array([0.9, 0.88, 0.87, 0.7, 0.6])
    assert diverse(similarity, vectors, 3, 0.0).tolist() == [0, 1, 2]
    assert diverse(similarity, vectors, 3, 0.3).tolist() == [0, 3, 4]
    assert diverse(similarity, vectors, 10, 1.0).tolist() == [0, 1, 2, 3, 4]


@laws
@given(COLLECTIONS, TEXTS, st.integers(1, 10), st.floats(0, 1))
def test_variety_keeps_scores_and_their_order(texts, query, k, diversity):
    view = view_of(texts)
    everything = dict(pairs(search(view, query, 100)))
    hits = search(view, query, k, diversity=diversity)
    assert len(hits) == min(k, len(texts))
    assert all(everything[i] == s for i, s in pairs(hits))
    assert [s for _, s in pairs(hits)] == sorted((s for _, s in pairs(hits)), reverse=True)


# ---- the whole


def test_why_tells_places_and_scores():
    view = view_of(["lease queue", "lease", "stars", "model score"])
    hits = search(view, "lease", 4)
    dense, bm25 = (search(view, "lease", 4, mode) for mode in ("dense", "bm25"))
    for hit in hits:
        assert list(hit.why) == ["dense", "bm25"]
        for part, found in (("dense", dense), ("bm25", bm25)):
            own = [h.score for h in found if h.chunk.id == hit.chunk.id]
            assert hit.why[part]["score"] == pytest.approx(own[0] if own else 0)
            assert hit.why[part]["rank"] == (1 + sum(h.score > own[0] + 1e-5 for h in found) if own and own[0] else None)
        assert hit.score == pytest.approx(ALPHA * hit.why["dense"]["score"] + (1 - ALPHA) * hit.why["bm25"]["score"])


@laws
@given(st.lists(TEXTS, min_size=31, max_size=40), TEXTS)
def test_places_are_the_same_for_few_and_many_hits(texts, query):
    view = view_of(texts)
    few, many = search(view, query, 3), search(view, query, 100)
    assert [hit.why for hit in few] == [hit.why for hit in many[:3]]


def test_a_question_without_words_is_answered_by_meaning_alone():
    view = view_of(["lease queue", "who knows", "stars"])
    assert search(view, "who is it", mode="bm25") == []
    assert pairs(search(view, "who is it")) == pairs(search(view, "who is it", mode="dense"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("query", ["数据在哪里", "Где мой заказ?", "؟", "👩🏽‍🔧", "\ud800 lease", "a\x00b", "%s {0} ' ; --", "word " * 1_999])
def test_any_text_is_a_question(mode, query):
    hits = search(view_of(["lease 数据", "queue", "word"]), query, 3, mode)
    assert all(0 <= hit.score <= 1 for hit in hits)


@pytest.mark.parametrize("query", ["", "  \n\t ", "x" * (MAX_QUERY + 1), "x" * 1_000_000, None, 7, b"lease", ["lease"]])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_question_is_refused(query, mode):
    with pytest.raises(RetrievalError) as caught:
        search(view_of(["lease"]), query, mode=mode)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k is 0; it is a whole number, 1 or more"),
        ({"k": -3}, r"k is -3"),
        ({"k": 2.5}, r"k is 2\.5"),
        ({"k": True}, r"k is True"),
        ({"k": "5"}, r"k is '5'"),
        ({"mode": "hybird"}, r"no mode 'hybird'\. Did you mean 'hybrid'\? Known: dense, bm25, hybrid, multi"),
        ({"mode": None}, r"no mode None"),
        ({"fusion": "RRF"}, r"no fusion 'RRF'. Did you mean 'rrf'"),
        ({"diversity": 1.5}, r"diversity is 1\.5; it is a number, from 0 to 1"),
        ({"diversity": float("nan")}, r"diversity is nan"),
        ({"diversity": 0.5, "k": MAX_DIVERSE + 1}, r"with diversity it is at most 100"),
        ({"vary": lambda q: []}, r"`vary` is for mode 'multi', not 'hybrid'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for view in (view_of(["lease"]), view_of([])):
        with pytest.raises(RetrievalError, match=message):
            search(view, "lease", **arguments)


@pytest.mark.parametrize("where", [{"pert": 1}, {"n": {"$bigger": 1}}, {"n": "text"}, {}, "n = 1"])
def test_a_bad_filter_is_refused(where):
    with pytest.raises(IndexingError):
        search(view_of(["lease", "queue"]), "lease", where=where)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_found_in_nothing(mode):
    assert search(view_of([]), "lease", mode=mode, rerank=True) == []
    assert search(view_of(["lease"]), "lease", mode=mode, where={"n": {"$gt": 5}}) == []


def test_k_may_be_larger_than_the_index():
    view = view_of(["lease", "queue"])
    assert len(search(view, "lease", 10_000)) == len(search(view, "lease", np.int64(10_000))) == 2


def test_hits_are_shown_and_cannot_write_html():
    hits = search(view_of(["<script>alert(1)</script> lease", "lease"]), "lease", 2)
    html = hits._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<tr>") == 3
    assert Hits()._repr_html_()


def test_threads_may_search_at_once():
    view, start = view_of([f"{WORDS[n % 7]} {WORDS[n % 5]} {n}" for n in range(200)]), threading.Barrier(4)

    def one(n: int) -> list[tuple[str, float]]:
        start.wait()
        return [p for query in ("lease queue", "model", "drift exam") for p in pairs(search(view, query, 10, "multi"))]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, range(4)))
    assert all(f == found[0] for f in found)


def test_on_a_real_index(tmp_path):
    with pytest.MonkeyPatch.context() as patch, Index(folder=tmp_path) as index:
        patch.setattr(r, "embed", embed)
        assert search(index, "lease") == []
        index.add("A lease says until when a consumer owns a message.", id="queue", metadata={"part": 4})
        index.add("The soup was cold, and the waiter did not apologise.", id="food", metadata={"part": 1})
        assert search(index, "How long may a worker keep what it took?")[0].chunk.document == "queue"
        assert [h.chunk.document for h in search(index, "lease", mode="bm25")] == ["queue"]
        assert [h.chunk.document for h in search(index, "lease", where={"part": 1})] == ["food"]
        assert search(index, "bad dinner", rerank=True, mode="multi")[0].chunk.document == "food"
        index.add("Dinner was bad.", id="more")
        assert search(index, "bad dinner")[0].chunk.document == "more", "what was added is seen"
        assert index.delete("more") == 1
        assert search(index, "bad dinner")[0].chunk.document == "food"
        with pytest.raises(IndexingError, match="pert"):
            search(index, "lease", where={"pert": 1})
