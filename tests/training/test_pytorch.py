"""Networks repeat themselves, go on after an interruption to the same bits, and are saved and read without pickle."""

import copy
import json
import pickletools
import threading

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import skops.io
import torch
from sklearn.base import clone
from torch import nn

from mlops_lib.data.tokens import TokenError, carve
from mlops_lib.training.classic import ClassicError, FittedModel
from mlops_lib.training.pytorch import (
    DEFAULTS,
    TorchError,
    TorchTextClassifier,
    best_epoch,
    build_network,
    finished,
    fit_pytorch,
    load_weights,
    loader,
    pick_device,
    scores,
    seeded,
    train_epoch,
    trim,
)

QUICK = {"epochs": 4, "patience": 4, "width": 8, "batch": 16, "length": 16, "learning_rate": 0.02}
WORDS = ["pytorch_bag", "pytorch_cnn"]
SAVED = ["mlops_lib.data.tokens.join_texts", "mlops_lib.training.classic.FittedModel", "mlops_lib.training.pytorch.TorchTextClassifier"]  # fmt: skip


def messages(n: int = 160, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Short messages: one word among others says what they are."
    rng = np.random.default_rng(seed)
    filler = ["the", "order", "came", "to", "our", "house", "this", "morning", "with", "two", "boxes", "and", "a", "letter"]
    y = rng.choice(["bad", "fine", "good"], n, p=[0.3, 0.2, 0.5])
    sign = {"bad": "broken", "fine": "okay", "good": "lovely"}
    texts = [" ".join(rng.permutation([*rng.choice(filler, rng.integers(2, 9)), sign[label]])) for label in y]
    return np.array(texts, dtype=object), y


def equal(a: TorchTextClassifier, b: TorchTextClassifier) -> bool:
    one, two = a.network_.state_dict(), b.network_.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class PowerCutError(Exception):
    "Ends a training from outside."


def cut_after(last: int):
    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == last:
            raise PowerCutError

    return on_epoch


@pytest.fixture(scope="module")
def fitted() -> FittedModel:
    texts, y = messages()
    return fit_pytorch("pytorch_cnn", pd.DataFrame({"text": texts}), pd.Series(y), params=QUICK, seed=3)


# --- chance


@pytest.mark.parametrize("kind", WORDS)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(kind):
    texts, y = messages()
    first = TorchTextClassifier(kind, 1, **QUICK).fit(texts, y)
    torch.rand(3)  # what others draw in between does not matter
    again, other = (TorchTextClassifier(kind, seed, **QUICK).fit(texts, y) for seed in (1, 2))
    assert equal(first, again) and first.history_ == again.history_
    assert not equal(first, other)


def test_the_generators_of_the_process_stay_as_they_were(fitted):
    texts, y = messages()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_num_threads()  # noqa: NPY002
    model = TorchTextClassifier(**QUICK).fit(texts, y)
    model.predict(texts)
    skops.io.loads(skops.io.dumps(fitted), trusted=SAVED)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.get_num_threads() == before[2]


def test_fits_side_by_side_do_not_draw_from_each_other():
    texts, y = messages()
    alone = TorchTextClassifier(seed=1, **QUICK).fit(texts, y)
    models = [TorchTextClassifier(seed=seed, **QUICK) for seed in (1, 2)]
    threads = [threading.Thread(target=model.fit, args=(texts, y)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal(alone, models[0])


def test_an_epoch_draws_the_same_whatever_ran_before_it():
    with seeded(5, 3):
        first = torch.rand(4)
    with seeded(5, 2), seeded(5, 3):
        assert torch.equal(first, torch.rand(4))
    with seeded(6, 3):
        assert not torch.equal(first, torch.rand(4))


# --- networks


@pytest.mark.parametrize("kind", WORDS)
def test_padding_changes_nothing_and_no_text_fails(kind, fitted):
    tokens = fitted.pipeline[-1].tokens_
    with seeded(0, 0):
        network = build_network(kind, tokens, 3, DEFAULTS).eval()
    short = torch.tensor([[2, 3, 4]])
    padded = nn.functional.pad(short, (0, 50))
    assert torch.allclose(network(short), network(padded), atol=1e-6)
    for empty in (torch.zeros((2, 1), dtype=torch.int64), torch.zeros((2, 30), dtype=torch.int64)):
        assert torch.isfinite(network(empty)).all()
    assert isinstance(network.embedding, nn.Embedding)
    assert not torch.allclose(network(short), network(torch.tensor([[2, 3, 5]])))


def test_only_the_convolutions_see_the_order(fitted):
    tokens = fitted.pipeline[-1].tokens_
    one, other = torch.tensor([[2, 3, 4, 5]]), torch.tensor([[5, 4, 3, 2]])
    bag, cnn = (build_network(kind, tokens, 3, DEFAULTS).eval() for kind in WORDS)
    assert torch.allclose(bag(one), bag(other), atol=1e-6)
    assert not torch.allclose(cnn(one), cnn(other), atol=1e-4)


def test_padding_is_never_learnt(fitted):
    assert not fitted.pipeline[-1].network_.embedding.weight[0].any()


def test_a_pass_shows_every_row_once_in_a_new_order():
    inputs, codes = np.arange(1, 71)[:, None].repeat(3, axis=1), np.arange(70) % 3
    batches = loader(inputs, codes, 16)
    with seeded(0, 1):
        first = torch.cat([ids[:, 0] for ids, _ in batches]).tolist()
        second = torch.cat([ids[:, 0] for ids, _ in batches]).tolist()
    assert sorted(first) == sorted(second) == list(range(1, 71))
    assert first != second


def test_a_batch_is_as_wide_as_its_longest_text():
    assert trim(torch.tensor([[4, 5, 0, 0], [3, 0, 0, 0]])).tolist() == [[4, 5], [3, 0]]
    assert trim(torch.zeros((2, 4), dtype=torch.int64)).shape == (2, 1)
    assert trim(torch.zeros((0, 4), dtype=torch.int64).new_zeros((1, 4))).shape == (1, 1)
    assert trim(torch.ones((2, 4))).shape == (2, 4)


# --- what it is fitted on


def test_words_of_validation_rows_are_not_in_the_vocabulary():
    texts, y = messages()
    _, held = carve(y, DEFAULTS["validation"], 1)
    texts = texts.copy()
    texts[held] = [f"{text} secret" for text in texts[held]]
    model = TorchTextClassifier(seed=1, **QUICK).fit(texts, y)
    assert "secret" not in model.tokens_.words(range(len(model.tokens_)))


def test_what_stands_in_validation_rows_does_not_move_the_weights():
    texts, y = messages()
    _, held = carve(y, DEFAULTS["validation"], 1)
    whole = {**QUICK, "epochs": 1, "shift": False}
    first = TorchTextClassifier(seed=1, **whole).fit(texts, y)
    other = texts.copy()
    other[held] = "the letter"
    assert equal(first, TorchTextClassifier(seed=1, **whole).fit(other, y))


def test_it_learns_and_keeps_the_best_epoch(fitted):
    texts, y = messages(300, seed=9)
    assert (fitted.predict(pd.DataFrame({"text": texts})) == y).mean() > 0.9
    losses = fitted.history["validation"]
    assert set(fitted.history) == {"train", "validation", "validation_f1"}
    assert fitted.params["epoch"] == int(np.argmin(losses)) + 1


def test_the_weights_are_those_of_the_best_epoch():
    texts, y = messages()
    wild = {**QUICK, "epochs": 12, "patience": 12, "learning_rate": 0.3, "shift": False}
    model = TorchTextClassifier(seed=1, **wild).fit(texts, y)
    best = best_epoch(model.history_["validation"])
    assert best < 12
    short = TorchTextClassifier(seed=1, **{**wild, "epochs": best}).fit(texts, y)
    assert equal(model, short)


def test_when_it_stops():
    assert not finished([], {"epochs": 3, "patience": 1})
    assert finished([1.0, 0.9, 0.8], {"epochs": 3, "patience": 9})
    assert finished([0.8, 0.9, 0.9], {"epochs": 9, "patience": 2})
    assert not finished([0.8, 0.9, 0.7], {"epochs": 9, "patience": 2})
    assert best_epoch([0.7, 0.5, 0.5]) == 2


def test_weights_raise_the_recall_of_a_rare_class():
    rng = np.random.default_rng(0)
    y = np.where(rng.random(400) < 0.1, "rare", "usual")
    words = lambda rare: rng.choice(["late", "box", "fine"], 4, p=[0.5, 0.3, 0.2] if rare else [0.25, 0.35, 0.4])
    texts = np.array([" ".join(words(label == "rare")) for label in y], dtype=object)
    recall = {}
    for balance in (None, "weights"):
        model = TorchTextClassifier(**QUICK, balance=balance, shift=False).fit(texts, y)
        recall[balance] = (model.predict(texts[y == "rare"]) == "rare").mean()
    assert recall["weights"] > recall[None] + 0.2


def test_on_epoch_is_told_the_curves_and_a_bar_is_shown_when_wanted(capsys):
    told = []
    texts, y = messages(60)
    quiet = TorchTextClassifier(on_epoch=lambda epoch, metrics: told.append((epoch, metrics)), **QUICK).fit(texts, y)
    assert [epoch for epoch, _ in told] == [1, 2, 3, 4]
    assert [metrics["validation"] for _, metrics in told] == quiet.history_["validation"]
    assert capsys.readouterr().err == ""
    TorchTextClassifier(progress=True, **QUICK).fit(texts, y)
    assert "4/4" in capsys.readouterr().err


# --- interruption


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("last", [1, 3, 4])
def test_a_fit_goes_on_after_a_cut_to_the_same_bits(kind, last, tmp_path):
    texts, y = messages()
    straight = TorchTextClassifier(kind, **QUICK).fit(texts, y)
    with pytest.raises(PowerCutError):
        TorchTextClassifier(kind, checkpoints=tmp_path, on_epoch=cut_after(last), **QUICK).fit(texts, y)
    went_on = []
    again = TorchTextClassifier(
        kind, checkpoints=tmp_path, on_epoch=lambda epoch, _: went_on.append(epoch), **QUICK
    ).fit(texts, y)
    assert went_on == list(range(last + 1, 5))
    assert equal(again, straight) and again.history_ == straight.history_
    assert (again.predict_proba(texts) == straight.predict_proba(texts)).all()


def test_a_cut_within_an_epoch_costs_that_epoch_only(tmp_path, monkeypatch):
    texts, y = messages()
    straight = TorchTextClassifier(**QUICK).fit(texts, y)

    def cut_within(network, batches, loss, optimizer, epoch):
        value = train_epoch(network, batches, loss, optimizer, epoch)  # the weights have moved
        if epoch == 3:
            raise KeyboardInterrupt
        return value

    with monkeypatch.context() as patch:
        patch.setattr("mlops_lib.training.pytorch.train_epoch", cut_within)
        with pytest.raises(KeyboardInterrupt):
            TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)
    went_on = []
    again = TorchTextClassifier(checkpoints=tmp_path, on_epoch=lambda epoch, _: went_on.append(epoch), **QUICK).fit(texts, y)
    assert went_on == [3, 4] and equal(again, straight)


def test_a_finished_fit_is_read_not_repeated(tmp_path):
    texts, y = messages(60)
    params = {"checkpoints": str(tmp_path), **QUICK}
    first = TorchTextClassifier(**params).fit(texts, y)
    again = TorchTextClassifier(**params, on_epoch=cut_after(1)).fit(texts, y)
    assert equal(first, again)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"], "and no part is left behind"


def test_patience_counts_the_epochs_before_the_cut(tmp_path):
    texts, y = messages()
    params = {**QUICK, "epochs": 30, "patience": 3, "learning_rate": 0.3}
    straight = TorchTextClassifier(**params).fit(texts, y)
    stop = best_epoch(straight.history_["validation"]) + 1
    with pytest.raises(PowerCutError):
        TorchTextClassifier(checkpoints=tmp_path, on_epoch=cut_after(stop), **params).fit(texts, y)
    again = TorchTextClassifier(checkpoints=tmp_path, **params).fit(texts, y)
    assert again.history_ == straight.history_ and equal(again, straight)


@pytest.mark.parametrize("change", [{"seed": 9}, {"epochs": 5}, {"kind": "pytorch_cnn"}, {"balance": "weights"}])
def test_a_checkpoint_of_other_settings_is_refused(change, tmp_path):
    texts, y = messages(60)
    params = {"checkpoints": tmp_path, "seed": 1, **QUICK}
    TorchTextClassifier(**params).fit(texts, y)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    name, value = next(iter(change.items()))
    with pytest.raises(TorchError, match=f"another training: {name}=.*now {value!r}"):
        TorchTextClassifier(**params | change).fit(texts, y)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    texts, y = messages(60)
    TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)
    texts[0] += " indeed"
    with pytest.raises(TorchError, match="another training: rows="):
        TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)


@pytest.mark.parametrize("how", ["empty", "cut", "bit", "header", "pickle"])
def test_a_damaged_checkpoint_is_refused(how, tmp_path):
    texts, y = messages(60)
    TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)
    file = tmp_path / "checkpoint.safetensors"
    content = bytearray(file.read_bytes())
    if how == "pickle":
        torch.save({"a": torch.zeros(2)}, file)
    else:
        place = content.index(b"history") + 30 if how == "header" else len(content) - 7
        content[place] ^= 1
        file.write_bytes({"empty": b"", "cut": content[:-40]}.get(how, content))
    with pytest.raises(TorchError, match="cannot be read"):
        TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, monkeypatch):
    texts, y = messages(60)
    TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)
    monkeypatch.setattr(
        "mlops_lib.training.pytorch.build_network",
        lambda kind, tokens, classes, params: build_network(kind, tokens, classes, {**params, "width": 9}),
    )
    with pytest.raises(TorchError, match=r"another network: best.embedding.weight is float32 \(\d+, 8\), not .* 9\)"):
        TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)


def test_a_checkpoint_is_no_pickle(tmp_path):
    texts, y = messages(60)
    TorchTextClassifier(checkpoints=tmp_path, **QUICK).fit(texts, y)
    content = (tmp_path / "checkpoint.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert {"state", "sha256"} == set(json.loads(content[8 : 8 + size])["__metadata__"])
    with pytest.raises(ValueError, match="opcode"):
        list(pickletools.genops(content))


# --- errors


def test_a_loss_that_is_no_number_ends_the_fit():
    texts, y = messages()
    with pytest.raises(TorchError, match=r"The loss became (nan|inf) in epoch \d+, batch \d+"):
        TorchTextClassifier("pytorch_cnn", **QUICK | {"learning_rate": 1e6, "epochs": 20, "patience": 20}).fit(texts, y)


def test_batch_and_epoch_of_a_bad_input_are_named():
    inputs = np.ones((40, 384), np.float32)
    inputs[25] = np.inf
    network = build_network("pytorch_minilm", None, 2, DEFAULTS | {"dropout": 0.0})
    batches = torch.utils.data.DataLoader(loader(inputs, np.zeros(40, np.int64), 8).dataset, 8, shuffle=False)
    with pytest.raises(TorchError, match="in epoch 7, batch 4"):
        train_epoch(network, batches, nn.CrossEntropyLoss(torch.ones(2)), torch.optim.SGD(network.parameters(), 0.1), 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_absent_is_an_error():
    texts, y = messages(60)
    with pytest.raises(TorchError, match="'cuda' is not here.*sees: .*cpu"):
        TorchTextClassifier(device="cuda", **QUICK).fit(texts, y)
    with pytest.raises(TorchError, match="'tpu'"):
        pick_device("tpu")
    assert pick_device("cpu").type == "cpu"


def frame(n: int = 60) -> tuple[pd.DataFrame, pd.Series]:
    texts, y = messages(n)
    return pd.DataFrame({"text": texts, "number": np.arange(n) / 7}), pd.Series(y)


def test_rows_that_cannot_be_learnt_from_are_refused():
    data, y = frame()
    with pytest.raises(TorchError, match=r"\['number'\] holds texts"):
        fit_pytorch("pytorch_bag", data[["number"]], y, params=QUICK)
    with pytest.raises(TorchError, match="on 0 rows"):
        fit_pytorch("pytorch_bag", data.head(0), y.head(0), params=QUICK)
    with pytest.raises(TorchError, match="is good in every row"):
        fit_pytorch("pytorch_bag", data, pd.Series(["good"] * 60), params=QUICK)
    with pytest.raises(TorchError, match="has 1 missing"):
        fit_pytorch("pytorch_bag", data, y.where(y.index > 0), params=QUICK)
    with pytest.raises(TorchError, match="no regression"):
        fit_pytorch("pytorch_bag", data, pd.Series(range(60)), task="regression", params=QUICK)
    with pytest.raises(TorchError, match="60 texts with 59 labels"):
        TorchTextClassifier(**QUICK).fit(data["text"], y[:59])
    with pytest.raises(TokenError, match=r"\[59, 1\] rows"):
        TorchTextClassifier(**QUICK).fit(data["text"], ["a"] * 59 + ["b"])


def test_a_failed_fit_leaves_the_model_as_it_was(fitted):
    texts, y = messages(60)
    model = TorchTextClassifier(**QUICK).fit(texts, y)
    before = model.predict_proba(texts)
    model.on_epoch = cut_after(2)
    with pytest.raises(PowerCutError):
        model.fit(*messages(60, seed=5))
    assert (model.predict_proba(texts) == before).all()


# --- predictions


def test_probabilities_sum_to_one_and_agree_with_the_labels(fitted):
    texts, _ = messages(100, seed=4)
    data = pd.DataFrame({"text": texts})
    proba = fitted.predict_proba(data)
    assert proba.dtype == np.float64
    assert fitted.classes == ["bad", "fine", "good"]
    assert np.allclose(proba.sum(axis=1), 1, atol=1e-12)
    assert (np.array(fitted.classes)[proba.argmax(axis=1)] == fitted.predict(data)).all()


def test_no_rows_one_row_and_texts_without_words(fitted):
    data = pd.DataFrame({"text": ["a lovely box", "", None, "¿¿ zzz 北京"]})
    assert len(fitted.predict(data.head(0))) == 0
    assert fitted.predict_proba(data.head(0)).shape == (0, 3)
    model = fitted.pipeline[-1]
    assert model.predict([]).shape == (0,) and model.predict_proba([]).shape == (0, 3)
    whole = fitted.predict_proba(data)
    assert np.isfinite(whole).all()
    for k in range(len(data)):
        assert np.allclose(fitted.predict_proba(data.iloc[[k]]), whole[[k]], atol=1e-6), "alone as among others"


def test_more_rows_than_one_batch_of_predictions(fitted):
    texts, _ = messages(600, seed=4)
    whole = fitted.predict_proba(pd.DataFrame({"text": texts}))
    assert np.allclose(whole[500:], fitted.predict_proba(pd.DataFrame({"text": texts[500:]})), atol=1e-6)


def test_a_label_that_training_never_saw_counts_as_wrong(fitted):
    model, (texts, y) = fitted.pipeline[-1], messages(50, seed=4)
    assert model.score(texts, np.full(50, "new")) == 0
    assert model.score(texts, y) > 0.8


@pytest.mark.parametrize("kind", [int, bool, str])
def test_classes_come_back_as_they_were(kind):
    data, y = frame()
    y = (y == "good").map(kind)
    model = fit_pytorch("pytorch_bag", data, y, params=QUICK)
    assert model.features == ["text"]
    assert model.classes == sorted(y.unique())
    assert type(model.predict(data)[0].item()) is kind


def test_two_columns_of_text_are_read_as_one():
    texts, y = messages(80)
    filler = np.array([f"the letter came this morning {k}" for k in range(80)], dtype=object)
    data = pd.DataFrame({"subject": filler, "text": texts})
    model = fit_pytorch("pytorch_bag", data, pd.Series(y), params=QUICK)
    assert model.features == ["subject", "text"]
    with pytest.raises(ClassicError, match="subject"):
        model.predict(data[["text"]])


def test_fitting_changes_neither_data_nor_settings():
    data, y = frame()
    copied, target, params = data.copy(), y.copy(), {**QUICK, "device": "cpu"}
    model = fit_pytorch("pytorch_bag", data, y, params=params)
    pd.testing.assert_frame_equal(data, copied)
    pd.testing.assert_series_equal(y, target)
    assert params == {**QUICK, "device": "cpu"}
    assert not {"device", "checkpoints", "on_epoch", "progress"} & model.params.keys()


# --- saved


def test_skops_gives_back_the_same_model(fitted):
    data = pd.DataFrame({"text": messages(80, seed=4)[0]})
    content = skops.io.dumps(fitted)
    assert sorted(skops.io.get_untrusted_types(data=content)) == SAVED
    again = skops.io.loads(content, trusted=SAVED)
    assert (again.predict_proba(data) == fitted.predict_proba(data)).all()
    assert (again.predict(data) == fitted.predict(data)).all()
    assert again.predict(data).dtype == fitted.predict(data).dtype
    assert again.history == fitted.history and again.params == fitted.params


def test_the_state_holds_plain_values_and_bytes_only(fitted, tmp_path):
    texts, y = messages(60)
    model = TorchTextClassifier(checkpoints=tmp_path, on_epoch=lambda *_: None, **QUICK).fit(texts, y)
    state = model.__getstate__()
    assert isinstance(state.pop("weights"), bytes)
    json.dumps(state)
    assert state["checkpoints"] is None, "no path of this machine goes into a model"


def change_width(state: dict) -> None:
    state["params"] = {**state["params"], "width": 9}


def change_class(state: dict) -> None:
    state["classes_"] = [*state["classes_"], "more"]


def change_bit(state: dict) -> None:
    state["weights"] = state["weights"][:-1] + bytes([state["weights"][-1] ^ 1])


def drop_word(state: dict) -> None:
    state["tokens"] = state["tokens"][:-30]


def ask_for_memory(state: dict) -> None:
    state["params"] = {**state["params"], "width": 10**9}


@pytest.mark.parametrize(
    ("damage", "told"),
    [(change_width, "another network"), (change_class, "another network"), (change_bit, "not those that were saved"),
     (drop_word, "no vocabulary"), (ask_for_memory, "width must be")],
)  # fmt: skip
def test_a_damaged_model_is_refused(fitted, damage, told):
    state = fitted.pipeline[-1].__getstate__()
    damage(state)
    with pytest.raises((TorchError, TokenError), match=told):
        TorchTextClassifier.__new__(TorchTextClassifier).__setstate__(state)


def test_weights_of_another_type_are_refused(fitted):
    network = copy.deepcopy(fitted.pipeline[-1].network_)
    double = {name: tensor.double() for name, tensor in network.state_dict().items()}
    with pytest.raises(TorchError, match="float64"):
        load_weights(network, double, "The file")
    few = {name: tensor for name, tensor in network.state_dict().items() if "embedding" in name}
    with pytest.raises(TorchError, match="is missing"):
        load_weights(network, few, "The file")
    assert safetensors.torch.save(network.state_dict())


def test_it_has_no_importance_of_columns_and_can_be_displayed(fitted):
    assert fitted.importance().empty
    assert "TorchTextClassifier" in fitted.pipeline._repr_html_()


def test_copies_clones_and_changed_settings(fitted):
    texts, _ = messages(30)
    model = fitted.pipeline[-1]
    assert (copy.deepcopy(model).predict_proba(texts) == model.predict_proba(texts)).all()
    fresh = clone(model)
    assert not hasattr(fresh, "network_") and fresh.get_params() == model.get_params()
    assert fresh.set_params(width=3, device="cpu").params["width"] == 3
    assert "width=8" in repr(model)


def test_a_network_on_finished_vectors(monkeypatch):
    asked = []

    def vectors(texts):
        asked.append(len(texts))
        rng = np.random.default_rng(0)
        word = {"broken": rng.normal(size=384), "okay": rng.normal(size=384), "lovely": rng.normal(size=384)}
        return np.array([sum(word.get(w, np.zeros(384)) for w in text.split()) for text in texts], np.float32)

    monkeypatch.setattr("mlops_lib.data.embedding.embed", vectors)
    texts, y = messages()
    model = fit_pytorch("pytorch_minilm", pd.DataFrame({"text": texts}), pd.Series(y), params=QUICK)
    assert asked == [len(texts)], "each text is embedded once for a fit"
    again = skops.io.loads(skops.io.dumps(model), trusted=SAVED)
    data = pd.DataFrame({"text": messages(40, seed=8)[0]})
    assert (again.predict_proba(data) == model.predict_proba(data)).all()
    assert scores(model.pipeline[-1].network_, np.zeros((2, 384), np.float32)).shape == (2, 3)
