"""The Keras networks are PyTorch's twins, go on to the same bits after an interruption, and read no file that is not theirs."""

import copy
import hashlib
import json
import random

import keras
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import skops.io
import tensorflow as tf
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import f1_score, log_loss

from mlops_lib.data.steps import prepare
from mlops_lib.data.tokens import TokenError, carve
from mlops_lib.training import keras as ours
from mlops_lib.training import pytorch as twin
from mlops_lib.training.keras import (
    DEFAULTS,
    KINDS,
    KerasError,
    KerasTextClassifier,
    batches,
    build_network,
    compile_network,
    fit_keras,
    pick_device,
    read_weights,
    scores,
    trim,
    write_weights,
)

QUICK = {"epochs": 4, "width": 8, "batch": 16, "learning_rate": 0.02}
FILLER = ["the", "order", "came", "to", "our", "house", "this", "morning", "with", "two", "boxes", "and", "a", "note"]


def messages(n: int = 160, seed: int = 0, rare: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    "Texts of filler with a word that says, nine times in ten, what the label is."
    rng = np.random.default_rng(seed)
    y = np.where(rng.random(n) < rare, "bad", "good")
    told = np.where(rng.random(n) < 0.1, "so", np.where(y == "bad", "broken", "lovely"))
    return np.array([" ".join([*rng.choice(FILLER, 6), word, "today"]) for word in told], dtype=object), y


def frame(n: int = 160, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    texts, y = messages(n, seed)
    return pd.DataFrame({"text": texts, "price": np.arange(n) % 7}), pd.Series(y, name="mood")


@pytest.fixture(scope="module")
def fitted():
    return fit_keras("keras_bag", *frame(), params=QUICK, seed=3)


def same(a: KerasTextClassifier, b: KerasTextClassifier) -> bool:
    return write_weights(a.network_) == write_weights(b.network_) and a.history_ == b.history_


# --- parity with PyTorch ---------------------------------------------------------------------------------------------


def twins(kind: str, inputs: int = 30, **params) -> tuple[torch.nn.Module, keras.Model]:
    "PyTorch's network, and ours with its weights."
    p = DEFAULTS | {"width": 8} | params
    with twin.seeded(5, 0):
        make = {"keras_bag": twin.Bag, "keras_cnn": twin.Convolutions, "keras_minilm": twin.Head}[kind]
        theirs = make(inputs, p["width"], 3, p["dropout"]).eval()
    w = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    names = {"words/embeddings": "embedding.weight", "hidden/kernel": "head.1.weight", "hidden/bias": "head.1.bias"}
    last = 4 if kind == "keras_minilm" else 1
    names |= {"classes/kernel": f"head.{last}.weight", "classes/bias": f"head.{last}.bias"}
    for k in range(3):
        names |= {f"windows_{k + 2}/{ours}": f"filters.{k}.{name}" for ours, name in (("kernel", "weight"), ("bias", "bias"))}
    network = build_network(kind, inputs, 3, p, seed=9)
    turned = {v.path: w[names[v.path]].T if v.path.endswith("kernel") else w[names[v.path]] for v in network.weights}
    read_weights(network, safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in turned.items()}))
    return theirs, network


def inputs_of(kind: str, rows: int = 40) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == "keras_minilm":
        return rng.normal(size=(rows, 30)).astype(np.float32)
    ids = rng.integers(1, 30, (rows, 12))
    return np.where(np.arange(12) < np.arange(rows)[:, None] % 13, ids, 0)  # from no word to twelve


@pytest.mark.parametrize("kind", KINDS)
def test_with_pytorchs_weights_the_probabilities_are_pytorchs(kind):
    theirs, network = twins(kind)
    X = inputs_of(kind)
    wanted = twin.scores(theirs, X).softmax(dim=1).numpy()
    assert np.abs(softmax(scores(network, X), axis=1) - wanted).max() < 1e-5
    assert np.isfinite(wanted).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_steps_lead_to_the_same_weights(kind):
    p = {"dropout": 0.0, "learning_rate": 0.01, "weight_decay": 0.1}
    theirs, network = twins(kind, **p)
    X, codes = inputs_of(kind), np.random.default_rng(2).integers(0, 3, 40)
    compile_network(network, DEFAULTS | p)
    network.fit(batches(X, np.eye(3, dtype=np.float32)[codes], 16, 7, 0, 4), epochs=4, steps_per_epoch=3, shuffle=False, verbose=0)
    optimizer, loss = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1), torch.nn.CrossEntropyLoss()
    for x, y in batches(X, codes, 16, 7, 0, 4):
        optimizer.zero_grad()
        loss(theirs(torch.tensor(x.numpy())), torch.tensor(y.numpy())).backward()
        optimizer.step()
    wanted = twin.scores(theirs, X).softmax(dim=1).numpy()
    assert np.abs(softmax(scores(network, X), axis=1) - wanted).max() < 1e-4


def test_kinds_and_settings_are_pytorchs():
    assert DEFAULTS is twin.DEFAULTS and ours.BOUNDS is twin.BOUNDS
    assert tuple(kind.replace("keras", "pytorch") for kind in KINDS) == twin.KINDS


def test_trained_apart_both_reach_the_same_f1():
    inbox = prepare(rows=3_000, seed=5)
    used, new = inbox[:1200], inbox[1200:2400]
    params = {"width": 32, "length": 60}
    f1 = {}
    for name, fit in (("keras_cnn", fit_keras), ("pytorch_cnn", twin.fit_pytorch)):
        model = fit(name, used[["text"]], used["label"], params=params, seed=1)
        f1[name] = f1_score(new["label"], model.predict(new), average="weighted")
    assert abs(f1["keras_cnn"] - f1["pytorch_cnn"]) < 0.04, f1
    assert min(f1.values()) > 0.7, f1


# --- repeatable ------------------------------------------------------------------------------------------------------


def drawn() -> list[float]:
    "What the process's generators give next: Python's, NumPy's, Keras's and TensorFlow's."
    numbers = [random.random(), np.random.random(), keras.random.uniform(()), tf.random.uniform(())]  # noqa: NPY002
    return [float(number) for number in numbers]


def test_the_seed_alone_decides_and_the_process_is_left_as_it_was(fitted):
    keras.utils.set_random_seed(1)
    wanted = drawn()
    keras.utils.set_random_seed(1)
    (data, y), given = frame(), {**QUICK, "progress": False}
    again = fit_keras("keras_bag", data, y, params=given, seed=3)
    assert drawn() == wanted
    pd.testing.assert_frame_equal(data, frame()[0])
    pd.testing.assert_series_equal(y, frame()[1])
    assert given == {**QUICK, "progress": False}
    other = fit_keras("keras_bag", *frame(), params=QUICK, seed=4)
    assert same(again.pipeline[-1], fitted.pipeline[-1])
    assert not same(other.pipeline[-1], fitted.pipeline[-1])


def test_each_epoch_holds_each_row_once_in_its_own_order():
    X = np.arange(10.0)
    epochs = [[x.numpy().tolist() for x, y in batches(X, X, 4, 2**32 - 1, k, k + 1)] for k in range(3)]
    assert all(sorted(sum(epoch, [])) == X.tolist() and [len(b) for b in epoch] == [4, 4, 2] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [x.numpy().tolist() for x, _ in batches(X, X, 4, 2**32 - 1, 0, 3)] == sum(epochs, [])


def test_batches_are_cut_after_their_longest_text():
    assert trim(tf.constant([[3, 1, 0, 0], [4, 0, 0, 0]], tf.int64)).numpy().tolist() == [[3, 1], [4, 0]]
    assert trim(tf.zeros((2, 4), tf.int64)).shape == (2, 1)
    assert trim(tf.zeros((2, 4))).shape == (2, 4), "vectors are not"


@pytest.mark.parametrize("kind", ["keras_bag", "keras_cnn"])
def test_a_text_is_scored_the_same_alone_and_beside_longer_ones(kind):
    network = build_network(kind, 30, 3, DEFAULTS, 1)
    X = inputs_of(kind)
    assert np.allclose(scores(network, X), np.vstack([scores(network, row[None]) for row in X]), atol=1e-5)


# --- stopping, going on ----------------------------------------------------------------------------------------------


def test_the_weights_of_the_best_epoch_are_kept():
    texts, y = messages(120)
    params = {**QUICK, "epochs": 30, "patience": 2, "learning_rate": 0.2, "shift": False}
    model = KerasTextClassifier("keras_bag", 1, **params).fit(texts, y)
    _, held = carve(y, DEFAULTS["validation"], 1)
    losses, best = model.history_["validation"], int(np.argmin(model.history_["validation"]))
    assert len(losses) == best + 3 < 30, "it stops two epochs after the best"
    assert log_loss(y[held], model.predict_proba(texts[held])) == pytest.approx(losses[best], abs=1e-5)
    f1 = f1_score(y[held], model.predict(texts[held]), average="weighted", zero_division=0)
    assert f1 == pytest.approx(model.history_["validation_f1"][best], abs=1e-5)


class Unplugged(Exception):
    pass


def unplug(at: int):
    def tell(epoch: int, metrics: dict) -> None:
        if epoch == at:
            raise Unplugged

    return tell


def classifier(folder=None, on_epoch=None, seed=2, **params) -> KerasTextClassifier:
    settings = {**QUICK, "epochs": 3, "balance": "weights", **params}
    return KerasTextClassifier("keras_bag", seed, checkpoints=folder, on_epoch=on_epoch, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    "What is left of a fit that was interrupted after its first epoch."
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Unplugged):
        classifier(folder, unplug(1)).fit(*messages(96))
    return (folder / "checkpoint.safetensors").read_bytes()


@pytest.fixture
def folder(checkpoint, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(checkpoint)
    return tmp_path


def test_a_fit_that_goes_on_ends_where_an_undisturbed_one_does(folder):
    epochs: list[int] = []
    tell = lambda epoch, metrics: epochs.append(epoch)
    resumed = classifier(folder, tell).fit(*messages(96))
    assert epochs == [2, 3]
    whole = classifier().fit(*messages(96))
    assert same(resumed, whole)
    finished = classifier(folder, tell).fit(*messages(96))
    assert epochs == [2, 3], "nothing was left to do"
    assert same(finished, whole)


def test_so_does_one_with_two_layers_of_dropout(tmp_path, monkeypatch):
    vectors = lambda texts: np.array([[len(t) % k for k in range(1, 385)] for t in texts], np.float32)
    monkeypatch.setattr("mlops_lib.data.embedding.embed", vectors)
    make = lambda **run: KerasTextClassifier("keras_minilm", 1, **{**QUICK, "epochs": 2}, **run)
    with pytest.raises(Unplugged):
        make(checkpoints=tmp_path, on_epoch=unplug(1)).fit(*messages(64))
    assert same(make(checkpoints=tmp_path).fit(*messages(64)), make().fit(*messages(64)))


def test_a_fit_interrupted_after_its_last_epoch_trains_no_further(tmp_path):
    params = {"learning_rate": 0.5, "patience": 1, "epochs": 30}
    undisturbed = classifier(**params).fit(*messages(96))
    last = len(undisturbed.history_["train"])
    assert last < 30
    with pytest.raises(Unplugged):
        classifier(tmp_path, unplug(last), **params).fit(*messages(96))
    assert same(classifier(tmp_path, unplug(last + 1), **params).fit(*messages(96)), undisturbed)


def test_a_checkpoint_of_another_training_is_refused(folder):
    for params, rows, problem in (
        ({"dropout": 0.1}, 96, "dropout=0.3, now 0.1"), ({"seed": 3}, 96, "seed=2, now 3"), ({}, 97, "rows="),
    ):  # fmt: skip
        with pytest.raises(KerasError, match=problem):
            classifier(folder, **params).fit(*messages(rows))


@pytest.mark.parametrize("harm", ["cut", "changed", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused(folder, checkpoint, harm):
    changed = bytearray(checkpoint)
    changed[-5] ^= 1
    foreign = safetensors.numpy.save({"a": np.ones(3)})
    harmed = {"cut": checkpoint[:-9], "changed": bytes(changed), "foreign": foreign, "empty": b""}[harm]
    (folder / "checkpoint.safetensors").write_bytes(harmed)
    with pytest.raises(KerasError, match=r"checkpoint.safetensors cannot be read.*Delete it"):
        classifier(folder).fit(*messages(96))


def test_a_checkpoint_of_pytorch_is_refused(tmp_path):
    with pytest.raises(Unplugged):
        twin.TorchTextClassifier("pytorch_bag", 2, checkpoints=tmp_path, on_epoch=unplug(1)).fit(*messages(96))
    with pytest.raises(KerasError, match="kind='pytorch_bag', now 'keras_bag'"):
        classifier(tmp_path).fit(*messages(96))


def test_a_loss_that_is_no_number_names_epoch_and_batch():
    wild = {**QUICK, "learning_rate": 1e6, "weight_decay": 10}
    with pytest.raises(KerasError, match=r"The loss became (nan|inf) in epoch 1, batch \d+\..*now 1e\+06"):
        KerasTextClassifier("keras_bag", 1, **wild).fit(*messages(400))


def test_on_epoch_and_the_bar_tell_how_it_goes(capsys):
    told = []
    tell = lambda epoch, metrics: told.append((epoch, metrics))
    model = KerasTextClassifier("keras_bag", 1, on_epoch=tell, progress=True, **{**QUICK, "epochs": 2}).fit(*messages(96))
    assert [epoch for epoch, _ in told] == [1, 2]
    assert told[1][1] == {name: curve[1] for name, curve in model.history_.items()}
    assert "2/2" in capsys.readouterr().err


# --- what is asked of every kind -------------------------------------------------------------------------------------


def test_it_learns_what_can_be_learnt(fitted):
    data, y = frame(300, seed=9)
    assert (fitted.predict(data) == y).mean() > 0.85
    assert fitted.classes == ["bad", "good"]
    assert list(fitted.history) == ["train", "validation", "validation_f1"]
    assert fitted.params == {**DEFAULTS, **QUICK, "seed": 3, "epoch": int(np.argmin(fitted.history["validation"])) + 1}


def test_probabilities_sum_to_one_for_any_number_of_rows(fitted):
    data, _ = frame(300, seed=2)
    for rows in (0, 1, 300):
        proba = fitted.predict_proba(data[:rows])
        assert proba.shape == (rows, 2) and proba.dtype == np.float64
        assert np.allclose(proba.sum(axis=1), 1, atol=1e-12)
        assert fitted.predict(data[:rows]).tolist() == [fitted.classes[k] for k in proba.argmax(axis=1)]
    assert fitted.pipeline[-1].predict([]).shape == (0,)


def test_empty_missing_and_unknown_texts_have_a_probability(fitted):
    odd = pd.DataFrame({"text": ["", None, "zzz qqq", "🙂", "lovely " * 5_000]})
    assert np.isfinite(fitted.predict_proba(odd)).all()
    assert fitted.pipeline.score(odd, ["a label that it never saw"] * 5) == 0


def test_the_vectors_of_lesson_14_can_be_learnt_from():
    data, y = frame(40)
    model = fit_keras("keras_minilm", data, y, params={**QUICK, "epochs": 8})
    assert (model.predict(data) == y).mean() > 0.7
    assert np.isfinite(model.predict_proba(pd.DataFrame({"text": [""]}))).all()


def test_weights_raise_the_recall_of_a_rare_class():
    texts, y = messages(400, rare=0.08)
    new, truth = messages(400, seed=1, rare=0.3)
    params = {**QUICK, "epochs": 2, "shift": False, "learning_rate": 0.01}
    recall = [
        (KerasTextClassifier("keras_bag", 1, balance=b, **params).fit(texts, y).predict(new)[truth == "bad"] == "bad").mean()
        for b in (None, "weights")
    ]
    assert recall[1] > recall[0] + 0.2, recall


@pytest.mark.parametrize("labels", [[1, 5], [False, True]], ids=str)
def test_classes_come_back_as_they_were(labels):
    texts, y = messages(64)
    model = KerasTextClassifier("keras_bag", 1, **{**QUICK, "epochs": 1}).fit(texts, np.where(y == "bad", *labels))
    assert model.classes_.tolist() == labels
    assert set(model.predict(texts).tolist()) <= set(labels)


def test_what_cannot_be_learnt_from_is_refused_in_words():
    data, y = frame(40)
    for problem, part, kwargs in (
        ("keras_bag' classifies texts; it has no regression", (data, y), {"task": "regression"}),
        ("on 0 rows", (data[:0], y[:0]), {}),
        ("has 1 missing", (data, y.where(y.index > 0)), {}),
        ("is bad in every row", (data, pd.Series(["bad"] * 40)), {}),
        (r"none of the columns \['price'\] holds texts", (data[["price"]], y), {}),
    ):
        with pytest.raises(KerasError, match=problem):
            fit_keras("keras_bag", *part, **kwargs)
    with pytest.raises(TokenError, match=r"\[20, 1, 19\] rows|each class needs two rows"):
        fit_keras("keras_bag", data, y.mask(y.index == 7, "lost"), params=QUICK)
    with pytest.raises(KerasError, match="3 texts with 2 labels"):
        KerasTextClassifier().fit(["a", "b", "c"], [0, 1])


# --- what both libraries are told ------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("make", [KerasTextClassifier, twin.TorchTextClassifier], ids=["keras", "pytorch"])


@BOTH
@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"epochs": 0}, "epochs must be a whole number between 1 and 10000, got 0."),
        ({"width": 2.5}, "width must be a whole number between 1 and 4096, got 2.5."),
        ({"batch": True}, "batch must be a whole number between 1 and 65536, got True."),
        ({"length": "9"}, "length must be a whole number between 1 and 4096, got '9'."),
        ({"dropout": 1.0}, "dropout must be between 0 and 0.95, got 1.0."),
        ({"validation": 0.9}, "validation must be between 0.01 and 0.5, got 0.9."),
        ({"learning_rate": "fast"}, "learning_rate must be between 1e-08 and 1e+06, got 'fast'."),
        ({"learning_rate": float("nan")}, "learning_rate must be between 1e-08 and 1e+06, got nan."),
        ({"balance": "under"}, "balance is None or 'weights', got 'under'."),
        ({"shift": "no"}, "shift is True or False, got 'no'."),
        ({"lenght": 9}, "has no setting 'lenght'. Nearest: length."),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(make, params, told):
    with pytest.raises(make.error) as e:
        make.check(make.kinds[0], params)
    assert str(e.value).endswith(told)
    with pytest.raises(make.error):
        make(**params).fit(*messages(20))


@BOTH
def test_numbers_of_numpy_are_settings_too(make):
    given = {"width": np.int64(8), "epochs": np.int32(2), "dropout": 0, "learning_rate": np.float32(0.5)}
    chosen = make.check(make.kinds[0], given)
    assert [type(chosen[name]) for name in given] == [int, int, float, float]
    json.dumps(chosen)
    assert len(make(**given).fit(*messages(64)).history_["train"]) == 2


@BOTH
def test_an_unknown_kind_is_named(make):
    with pytest.raises(make.error, match=f"no kind 'bert'. Kinds: {make.kinds[0]}, {make.kinds[1]}"):
        make.check("bert", {})
    with pytest.raises(make.error, match="no kind 'bert'"):
        make("bert").fit(*messages(20))
    assert make().kind == make.kinds[0]


def test_a_device_that_is_asked_for_has_to_be_there(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    with pytest.raises(KerasError, match=r"Device 'cuda' is not here .*sees: cpu"):
        fit_keras("keras_bag", *frame(40), params={"device": "cuda"})
    with pytest.raises(KerasError, match="'tpu'"):
        pick_device("tpu")
    assert pick_device("auto") == pick_device("cpu") == "/CPU:0"
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a GPU"])
    monkeypatch.setattr("sys.platform", "linux")
    assert pick_device("auto") == pick_device("cuda") == "/GPU:0"
    with pytest.raises(KerasError, match="'mps' is not here .*cuda, cpu"):
        pick_device("mps")


# --- saved and read --------------------------------------------------------------------------------------------------

TRUSTED = [
    "mlops_lib.data.tokens.join_texts", "mlops_lib.training.classic.FittedModel",
    "mlops_lib.training.keras.KerasTextClassifier",
]  # fmt: skip


def test_skops_writes_and_reads_a_model_without_pickle(fitted):
    data = skops.io.dumps(fitted)
    assert skops.io.get_untrusted_types(data=data) == TRUSTED
    read = skops.io.loads(data, trusted=TRUSTED)
    new, _ = frame(50, seed=8)
    assert (read.predict_proba(new) == fitted.predict_proba(new)).all()
    assert read.predict(new).tolist() == fitted.predict(new).tolist()
    assert read.history == fitted.history and read.params == fitted.params


def test_a_model_holds_plain_values_and_bytes(fitted, tmp_path):
    model = copy.deepcopy(fitted.pipeline[-1]).set_params(checkpoints=tmp_path, on_epoch=print)
    state = model.__getstate__()
    weights = state.pop("weights")
    assert json.loads(json.dumps(state)) == state
    assert safetensors.numpy.load(weights).keys() == {w.path for w in model.network_.weights}
    assert (state["on_epoch"], state["checkpoints"]) == (None, None)


def test_changed_weights_and_those_of_another_network_are_refused(fitted):
    state = fitted.pipeline[-1].__getstate__()
    changed = bytearray(state["weights"])
    changed[-1] ^= 1
    other = write_weights(build_network("keras_cnn", 20, 2, DEFAULTS, 1))
    for weights, digest, problem in (
        (bytes(changed), state["sha256"], "not those that were saved"),
        (other, hashlib.sha256(other).hexdigest(), "classes/kernel is .* there, and .* here"),
        (b"nothing", hashlib.sha256(b"nothing").hexdigest(), "These 7 bytes are no weights"),
    ):
        with pytest.raises(KerasError, match=problem):
            KerasTextClassifier.__new__(KerasTextClassifier).__setstate__({**state, "weights": weights, "sha256": digest})


def test_a_weight_that_is_missing_is_named():
    network = build_network("keras_bag", 20, 2, DEFAULTS, 1)
    part = safetensors.numpy.load(write_weights(network))
    del part["classes/bias"]
    with pytest.raises(KerasError, match=r"classes/bias is missing there, and \(2,\) float32 here"):
        read_weights(network, safetensors.numpy.save(part))


def test_it_is_an_estimator_like_others(fitted):
    model = KerasTextClassifier("keras_cnn", 5, epochs=3)
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(NotFittedError, match="not fitted yet"):
        model.predict(["lovely"])
    assert model.set_params(epochs=2, seed=6).get_params()["epochs"] == 2
    new = np.array(["lovely today", "broken"], dtype=object)
    copied = copy.deepcopy(fitted.pipeline[-1])
    assert (copied.predict_proba(new) == fitted.pipeline[-1].predict_proba(new)).all()
