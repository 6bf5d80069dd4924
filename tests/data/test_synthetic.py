"""The generated inbox: the same every time, with flaws at their rates, tables that agree, and worth training on."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.data import synthetic
from mlops_lib.data.synthetic import (
    CATEGORIES,
    KIND,
    SPEAKERS,
    Drift,
    Knobs,
    SyntheticError,
    Words,
    World,
    bank,
    generate_inbox,
    grammar,
    load_inbox,
    make_block,
    misspell,
    render,
    write_inbox,
)
from mlops_lib.data.tables import BUSINESS, REVIEW, USER, add_label, load_businesses, load_reviews, load_users

CLEAN = {"duplicates": 0, "missing": 0, "invalid": 0}


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.dropna(subset=["stars", "text"]).drop_duplicates("text")
    return add_label(frame[frame["stars"].between(1, 5)])


# ---------------------------------------------------------------- grammar


def test_every_section_has_enough_templates_for_every_category():
    for (kind, sign), section in grammar()[1].items():
        if kind in KIND:
            for category in CATEGORIES:
                fit = [template for only, template in section if category in only]
                assert len(fit) >= synthetic.DEPTH, f"[{kind} {sign}] has {len(fit)} templates for {category}"


def test_every_slot_has_words_and_no_sentence_keeps_a_brace():
    slots, sections = grammar()
    for name, words in slots.items():
        assert "*" in words or set(words) == set(CATEGORIES), f"slot {name} lacks words for some category"
        assert all(w for choice in words.values() for w in choice), f"slot {name} has an empty word"
    for (kind, _), section in sections.items():
        for only, template in section:
            assert only <= set(CATEGORIES), f"[{kind}] is for an unknown category: {only}"
            for category in only:
                text = render(template, Words(category, synthetic.Random(1)))
                assert "{" not in text
                assert "|" not in text
                assert text == text.strip()


def test_all_topics_and_signs_are_in_the_bank():
    stock = bank()
    for topic in synthetic.TOPICS:
        assert (stock.start[:, KIND[topic], :] >= 0).all(), topic
    for role in synthetic.ROLES:
        assert (stock.start[:, KIND[role], :] >= 0).any(axis=1).all(), role
    assert stock.size == len(CATEGORIES) * SPEAKERS * synthetic.DEPTH * int((stock.start[0] >= 0).sum())


def test_fixed_words_stay_and_articles_agree():
    words = Words("gym", synthetic.Random(3), "thing")
    assert len({render("{thing}", words) for _ in range(20)}) == 1
    assert render("a apple and a pear", words) == "an apple and a pear"


@given(st.text(max_size=80), st.integers(0, 10_000))
def test_misspelling_changes_little(text, seed):
    wrong = misspell(text, synthetic.Random(seed))
    assert abs(len(wrong) - len(text)) <= 2
    if not re.search(r"[^\W\d_]{4}", text):
        assert wrong == text


# ---------------------------------------------------------------- determinism


def test_the_same_knobs_give_the_same_inbox():
    a, b = generate_inbox(1500), generate_inbox(1500)
    for table in ("review", "user", "business"):
        pd.testing.assert_frame_equal(getattr(a, table), getattr(b, table))
    assert not generate_inbox(1500, seed=1).review["text"].equals(a.review["text"])


def test_numpys_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    generate_inbox(100)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_what_is_written_is_what_is_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "BLOCK", 700)
    seen = []
    paths = write_inbox(tmp_path, 2000, progress=seen.append, typos=0.3)
    inbox = generate_inbox(2000, typos=0.3)
    pd.testing.assert_frame_equal(load_reviews(paths["review"]), inbox.review)
    pd.testing.assert_frame_equal(load_users(paths["user"]), inbox.user)
    pd.testing.assert_frame_equal(load_businesses(paths["business"]), inbox.business)
    assert seen == [700, 1400, 2000]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["business.json", "review.json", "user.json"]
    row = json.loads(paths["business"].read_text().splitlines()[0])
    assert isinstance(row["hours"], dict), "nested as in Yelp's own file"


def test_a_block_can_be_made_alone():
    knobs = Knobs(n_reviews=25_000)
    world = World(knobs)
    for number in range(3):
        last = make_block(world, number)
    assert make_block(World(knobs), 2).equals(last)
    assert len(last) == 5000


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    (tmp_path / "review.json").write_text("old\n")
    with pytest.raises(KeyboardInterrupt):
        write_inbox(tmp_path, 500, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["review.json"]
    assert (tmp_path / "review.json").read_text() == "old\n"


# ---------------------------------------------------------------- tables


def test_columns_and_types():
    inbox = generate_inbox(600)
    assert list(inbox.review) == list(REVIEW)
    assert list(inbox.user) == list(USER)
    assert list(inbox.business) == list(BUSINESS)
    assert len(inbox.review) == 600
    assert inbox.review["review_id"].str.len().eq(22).all()


def test_aggregates_agree_with_the_reviews():
    inbox = generate_inbox(5000, **CLEAN)
    by_user = inbox.review.groupby("user_id")["stars"].agg(["size", "mean"])
    user = inbox.user.set_index("user_id")
    assert set(by_user.index) == set(user.index)
    assert (by_user["size"] == user["review_count"].reindex(by_user.index)).all()
    assert np.allclose(by_user["mean"].round(2), user["average_stars"].reindex(by_user.index), atol=0.011)
    by_business = inbox.review.groupby("business_id")["stars"].agg(["size", "mean"])
    business = inbox.business.set_index("business_id").reindex(by_business.index)
    assert (by_business["size"] == business["review_count"]).all()
    assert ((by_business["mean"] - business["stars"]).abs() <= 0.2501).all()
    votes = inbox.review.groupby("user_id")[["useful", "funny", "cool"]].sum()
    assert (votes == user[["useful", "funny", "cool"]].reindex(votes.index)).all().all()
    first = inbox.review.groupby("user_id")["date"].min()
    assert (user["yelping_since"].reindex(first.index) < first).all()


def test_dates_are_in_order_and_in_range():
    dates = generate_inbox(3000, **CLEAN, start="2020-05-01", end="2020-06-01").review["date"]
    assert dates.is_monotonic_increasing
    assert dates.min() >= pd.Timestamp("2020-05-01")
    assert dates.max() < pd.Timestamp("2020-06-01")


def test_there_is_a_season():
    dates = generate_inbox(30_000, **CLEAN).review["date"]
    month = dates.dt.month.value_counts()
    assert month[12] > 1.2 * month[2]
    assert dates.dt.hour.between(17, 22).sum() > 4 * dates.dt.hour.between(1, 6).sum()


def test_length_is_long_tailed():
    length = generate_inbox(8000, **CLEAN).review["text"].str.len()
    assert length.quantile(0.05) < 30
    assert 80 < length.median() < 250
    assert length.max() > 1000


# ---------------------------------------------------------------- knobs


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.1, 1), min_size=3, max_size=3), st.integers(0, 10_000))
def test_class_balance(shares, seed):
    balance = tuple(np.array(shares) / sum(shares))
    review = generate_inbox(6000, seed, class_balance=balance, noise=0, difficulty=0, **CLEAN).review
    found = add_label(review)["label"].value_counts(normalize=True).reindex(range(3), fill_value=0)
    assert np.allclose(found, balance, atol=0.08)


@pytest.mark.parametrize("share", [0, 0.05, 0.5])
def test_duplicates(share):
    review = generate_inbox(20_000, duplicates=share, missing=0, invalid=0).review
    previous = review.shift()
    content = ["user_id", "business_id", "text", "stars"]
    again = (review[content] == previous[content]).all(axis=1)
    assert abs(again.mean() - share) < 0.01
    same_id = review["review_id"].duplicated()
    assert (again[same_id]).all()
    if share:
        assert 0.35 < same_id.sum() / again.sum() < 0.65, "half delivered twice, half sent twice"
        sent = again & ~same_id
        assert (review["date"][sent] >= previous["date"][sent]).all()


def test_missing_and_invalid_at_their_rates():
    inbox = generate_inbox(40_000, missing=0.05, invalid=0.04, duplicates=0)
    review = inbox.review
    for name in ("stars", "text", "date", "useful"):
        assert abs(review[name].isna().mean() - 0.05) < 0.005, name
    assert review[["user_id", "business_id", "review_id"]].notna().all().all()
    wrong = (review["stars"] > 5) | (review["useful"] < 0) | (review["business_id"] == "unknown") | (review["date"].dt.year > 2090)
    assert abs(wrong.mean() - 0.04) < 0.006
    assert not set(review["business_id"]) - set(inbox.business["business_id"]) - {"unknown"}
    assert not set(review["user_id"]) - set(inbox.user["user_id"])


def test_typos_make_more_different_words():
    def words(share):
        return len(set(" ".join(generate_inbox(1500, typos=share, **CLEAN).review["text"]).split()))

    assert words(0) < words(0.15) < words(0.6)


@pytest.mark.parametrize(("wrong", "words"), [
    ({"duplicate": 0.1}, "Did you mean 'duplicates'"), ({"noise": 1.5}, "noise must lie between 0 and 1"),
    ({"n_reviews": 0}, "at least 1"), ({"class_balance": (0.5, 0.5, 0.5)}, "sum 1"), ({"class_balance": (0.5, 0.5)}, "three"),
    ({"start": "2025-01-01", "end": "2024-01-01"}, "before end"), ({"start": "soon"}, "must be a date"),
])
def test_wrong_knobs_are_refused(wrong, words):
    with pytest.raises(SyntheticError, match=words):
        generate_inbox(**wrong)


def test_wrong_drifts_are_refused():
    with pytest.raises(SyntheticError, match="covariate, label or concept"):
        Drift("sudden")
    with pytest.raises(SyntheticError, match="drift at must be a date"):
        Drift("label", at="later")


@pytest.mark.parametrize("n", [1, 2, 11, 100])
def test_small_inboxes(n):
    inbox = generate_inbox(n)
    assert len(inbox.review) == n
    assert len(inbox.user) >= 1


# ---------------------------------------------------------------- drift


def test_concept_drift_changes_stars_and_nothing_else():
    plain = generate_inbox(4000, **CLEAN).review
    drifted = generate_inbox(4000, **CLEAN, drift=Drift("concept", "2024-01-01")).review
    pd.testing.assert_frame_equal(plain.drop(columns="stars"), drifted.drop(columns="stars"))
    after = plain["date"] >= "2024-01-01"
    assert drifted["stars"][~after].equals(plain["stars"][~after])
    assert 0.6 < (plain["stars"] - drifted["stars"])[after].mean() < 1.1


def test_label_drift_changes_the_shares_at_its_date():
    drifted = usable(generate_inbox(12_000, **CLEAN, drift=Drift("label", "2024-01-01")).review)
    negative = (drifted["label"] == 0).groupby(drifted["date"] >= "2024-01-01").mean()
    assert negative[True] > negative[False] + 0.2


def test_covariate_drift_changes_the_messages_and_hardly_the_labels():
    inbox = generate_inbox(12_000, **CLEAN, drift=Drift("covariate", "2024-01-01"))
    frame = inbox.review.merge(inbox.business[["business_id", "categories"]], on="business_id")
    after = frame["date"] >= "2024-01-01"
    newer = frame["categories"].str.contains("Electronics|Couriers|Internet")
    assert newer[after].mean() > newer[~after].mean() + 0.35
    assert frame["text"].str.len()[after].median() < 0.8 * frame["text"].str.len()[~after].median()
    assert abs((frame["stars"] <= 2)[after].mean() - (frame["stars"] <= 2)[~after].mean()) < 0.08


def test_drift_of_no_strength_changes_nothing():
    plain = generate_inbox(1000).review
    for kind in ("covariate", "label", "concept"):
        pd.testing.assert_frame_equal(generate_inbox(1000, drift=Drift(kind, "2023-06-01", strength=0)).review, plain)


def test_drift_can_grow():
    knobs = Knobs(drift=Drift("label", "2024-01-01", strength=2, days=10))
    when = np.array([pd.Timestamp(day).timestamp() for day in ("2023-12-31", "2024-01-01", "2024-01-06", "2024-01-11", "2024-12-01")])
    share = synthetic.progress_of(knobs.drift, "label", when)
    assert share[0] == 0
    assert share[1] < 0.01
    assert abs(share[2] - 1) < 0.01
    assert share[3] == share[4] == 2


# ---------------------------------------------------------------- worth training on


def baseline_f1(frame: pd.DataFrame, seed: int = 0) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline

    frame = usable(frame)
    x, y = frame["text"].to_numpy(object), frame["label"].to_numpy()
    a, b, ya, yb = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=3, max_iter=300))
    return f1_score(yb, model.fit(a, ya).predict(b), average="weighted")


@pytest.mark.parametrize("seed", [42, 7, 2024])
def test_the_baseline_lands_between_hopeless_and_easy(seed):
    frame = generate_inbox(seed=seed).review
    mean = np.mean([baseline_f1(frame, split) for split in range(2)])
    assert 0.75 < mean < 0.9


def test_difficulty_moves_the_baseline():
    easy, middle, hard = (baseline_f1(generate_inbox(3000, difficulty=d).review) for d in (0, 0.5, 1))
    assert easy > middle + 0.03 > hard + 0.1


def test_no_single_word_gives_the_class_away():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics import f1_score

    frame = usable(generate_inbox().review)
    y = frame["label"].to_numpy()
    has = CountVectorizer(binary=True, min_df=0.02).fit_transform(frame["text"]).toarray().astype(bool)
    common = np.bincount(y, minlength=3)
    best = 0.0
    for column in has.T:
        inside = np.bincount(y[column], minlength=3)
        guess = np.where(column, inside.argmax(), (common - inside).argmax())
        best = max(best, f1_score(y, guess, average="weighted"))
    assert best < 0.65


# ---------------------------------------------------------------- load


def test_load_inbox_is_kept_and_follows_its_knobs():
    a = load_inbox(rows=300, seed=5)
    b = load_inbox(rows=300, seed=5)
    for table in ("review", "user", "business"):
        pd.testing.assert_frame_equal(getattr(a, table), getattr(b, table))
    pd.testing.assert_frame_equal(a.review, generate_inbox(300, 5).review)
    drifted = load_inbox(rows=300, seed=5, drift=Drift("label", "2023-01-02"))
    assert not drifted.review["stars"].equals(a.review["stars"])


def test_load_inbox_of_a_file(tmp_path):
    paths = write_inbox(tmp_path, 200)
    inbox = load_inbox(paths["review"])
    assert len(inbox.review) == 200
    assert inbox.user is None
    assert inbox.business is None
    assert len(load_inbox(paths["review"], rows=50).review) == 50
