"""A vocabulary knows training rows only, numbers words the same way everywhere, and comes back from its file as it was."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_lib.data.tokens import TokenError, Tokens, carve, class_weights, join_texts

TEXTS = ["The soup was cold.", "The soup was good!", "Cold, cold soup... but it isn’t bad", "it isn't good"]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens.fit(TEXTS)


def test_frequent_words_come_first_and_ties_by_the_alphabet(tokens):
    assert tokens.words(range(len(tokens))) == [
        "[UNK]", "soup", ".", "cold", "good", "isn't", "it", "the", "was",
    ]  # fmt: skip


def test_a_word_counts_once_for_each_text():
    assert "echo" not in Tokens.fit(["echo echo echo", "a b", "a b"]).words([2, 3])


def test_one_spelling_for_case_accents_and_apostrophes(tokens):
    assert tokens.split("The CAFÉ isn’t open...") == ["the", "cafe", "isn't", "open", ".", ".", "."]
    assert tokens.encode(["IT ISN’T"], 2).tolist() == tokens.encode(["it isn't"], 2).tolist()


def test_long_texts_are_cut_and_short_ones_padded(tokens):
    ids = tokens.encode(["the soup was cold", "soup", "", None, float("nan")], 3)
    assert ids.shape == (5, 3)
    assert ids.dtype == np.int64
    assert tokens.words(ids[0]) == ["the", "soup", "was"]
    assert ids[1, 1:].tolist() == [0, 0]
    assert not ids[2:].any()


def test_no_text_gives_no_row(tokens):
    assert tokens.encode([], 7).shape == (0, 7)
    assert tokens.encode(pd.Series([], dtype=str), 7).shape == (0, 7)


def test_the_size_counts_padding_and_unknown():
    assert len(Tokens.fit(TEXTS, size=4, min_count=1)) == 4
    assert len(Tokens.fit(TEXTS, min_count=1)) == 2 + 12


def test_words_of_other_rows_are_unknown(tokens):
    assert tokens.encode(["delicious dessert"], 2).tolist() == [[1, 1]]


@pytest.mark.parametrize("text", ["[PAD]", "[UNK] [PAD] soup", "[pad]"])
def test_a_text_cannot_spell_padding_or_unknown(tokens, text):
    assert (tokens.encode([text], 3)[0] != 0).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=60), max_size=8), st.integers(1, 20))
def test_any_text_becomes_a_row_of_known_numbers(texts, length):
    tokens = Tokens.fit(TEXTS)
    ids = tokens.encode(texts, length)
    assert ids.shape == (len(texts), length)
    assert ((ids >= 0) & (ids < len(tokens))).all()
    for row in ids:
        used = np.flatnonzero(row)
        assert (used == np.arange(len(used))).all(), "padding stands only at the end"
        assert len(tokens.words(row)) == len(used)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=8))
def test_what_is_read_back_encodes_the_same(texts):
    tokens = Tokens.fit([*texts, *TEXTS], min_count=1)
    again = Tokens.from_json(tokens.to_json())
    assert len(again) == len(tokens)
    assert (again.encode(texts, 12) == tokens.encode(texts, 12)).all()
    assert again.to_json() == tokens.to_json()


def test_half_a_character_pair_is_no_reason_to_fail(tokens):
    assert tokens.encode(["soup \ud800"], 3)[0, 0] != 1


def damaged(text: str) -> dict[str, str]:
    content = json.loads(text)
    moved = json.loads(text)
    moved["model"]["vocab"]["[PAD]"] = 99
    other_rule = {**content, "normalizer": None}
    added = {**content, "added_tokens": [
        {"id": 0, "content": "[PAD]", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    ]}  # fmt: skip
    return {
        "empty": "", "no json": "soup", "cut": text[:-20], "list": "[]", "moved": json.dumps(moved),
        "rule": json.dumps(other_rule), "special": json.dumps(added),
    }  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "no json", "cut", "list", "moved", "rule", "special"])
def test_a_damaged_or_foreign_vocabulary_is_refused(tokens, how):
    with pytest.raises(TokenError, match="vocabulary"):
        Tokens.from_json(damaged(tokens.to_json())[how])


def test_errors_name_what_is_wrong(tokens):
    with pytest.raises(TokenError, match="not one text"):
        tokens.encode("soup", 3)
    with pytest.raises(TokenError, match="Text 1 is int 7"):
        tokens.encode(["soup", 7], 3)
    with pytest.raises(TokenError, match="got 0"):
        tokens.encode(["soup"], 0)
    with pytest.raises(TokenError, match="no word number 99"):
        tokens.words([2, 99])
    with pytest.raises(TokenError, match="no word number -1"):
        tokens.words([-1])
    with pytest.raises(TokenError, match="got 2 and 1"):
        Tokens.fit(TEXTS, size=2, min_count=1)
    with pytest.raises(TokenError, match="None of the 3 words occurs in 2 texts"):
        Tokens.fit(["one", "two", "three"])
    with pytest.raises(TokenError, match="None of the 0 words"):
        Tokens.fit([], min_count=1)


def test_columns_of_text_are_joined():
    data = pd.DataFrame({"subject": ["Late", None, "x"], "text": ["It never came.", "Thanks!", np.nan]})
    assert join_texts(data).tolist() == ["Late It never came.", "Thanks!", "x"]
    assert join_texts(data[["text"]]).tolist() == ["It never came.", "Thanks!", ""]
    assert join_texts(data.head(0)).shape == (0,)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5), st.floats(0.02, 0.98), st.integers(0, 2**32 - 1)
)
def test_every_row_is_on_one_side_and_every_class_on_both(counts, share, seed):
    y = np.repeat(np.arange(len(counts)), counts)
    fit, held = carve(y, share, seed)
    assert sorted([*fit, *held]) == list(range(len(y)))
    assert set(y[fit]) == set(y[held]) == set(y)
    for k, n in enumerate(counts):
        assert abs((y[held] == k).sum() - share * n) <= 1, "the share holds in every class"


def test_the_division_depends_on_the_seed_and_on_nothing_else():
    y = np.array(["a", "b"] * 50)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = carve(y, 0.2, 1), carve(y, 0.2, 1), carve(y, 0.2, 2)
    assert (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


@pytest.mark.parametrize(("y", "share"), [(["a", "a", "b"], 0.2), ([], 0.2), (["a", "b"] * 5, 0.0), (["a", "b"] * 5, 1.0)])
def test_what_cannot_be_divided_is_refused(y, share):
    with pytest.raises(TokenError, match=f"A share of {share}"):
        carve(y, share, 0)


def test_weights_make_every_class_count_the_same():
    y = np.array(["a"] * 8 + ["b"] * 2)
    weights = class_weights(y)
    assert weights.tolist() == [10 / 16, 10 / 4]
    assert weights[0] * 8 == weights[1] * 2
