"""Gates: fair exams, honest tests, decisions that are kept, and a champion that only decisions move."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as slow
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from scipy.stats import binom
from sklearn.metrics import accuracy_score, f1_score

from mlops_lib.registry import gates
from mlops_lib.registry.gates import (
    Decision,
    Gate,
    RegistryError,
    champion,
    compare,
    decisions,
    find,
    freeze_exam,
    hold_out,
    load_exam,
    mcnemar,
    models,
    paired_bootstrap,
    promote,
    rollback,
    set_alias,
    unseen,
    versions,
)
from mlops_lib.registry.tracking import log_run, open_store, register
from mlops_lib.training import train

GOALS = {"accuracy": 0.6}


def table(n: int, seed: int, extra: bool = False) -> pd.DataFrame:
    "A label that depends on three numbers, with some noise."
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(n, 3)).round(6), columns=["a", "b", "c"])
    frame["label"] = np.where(frame.a + frame.b + 0.5 * rng.normal(size=n) > 0, "yes", "no")
    return frame.assign(d=rng.normal(size=n)) if extra else frame


ROWS = table(900, seed=0)
EXAM = table(400, seed=1)


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    "A store with runs to register: poor (one column), good, twin of good, cheat (has read half the exam)."
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")

    def run(data, **more):
        done = train("logistic", data, "label", targets=GOALS, params={"shift": False}, **more)
        return log_run(done, data, store=store)

    good = run(ROWS)
    kinds = {
        "good": good,
        "poor": run(ROWS[["b", "c", "label"]]),
        "cheat": run(pd.concat([ROWS, EXAM.iloc[::2]], ignore_index=True)),
        "other columns": run(table(500, seed=3, extra=True)),
        "blind": log_run(train("logistic", ROWS, "label", targets=GOALS, params={"shift": False}), store=store),
        "ambitious": log_run(train("logistic", ROWS, "label", targets={"accuracy": 0.999}), ROWS, store=store),
    }
    return store, kinds


counter = itertools.count()


@pytest.fixture
def world(runs_of):
    "A fresh model name in the shared store, with its exam."
    store, kinds = runs_of
    name = f"model-{next(counter)}"
    exam = freeze_exam(EXAM, "label", name)

    class World:
        def add(self, kind: str) -> int:
            return register(kinds[kind], name, store=store)

        def promote(self, where="challenger", **more) -> Decision:
            return promote(where, more.pop("exam", exam), name=name, store=store, **more)

        def rollback(self, reason="a test") -> Decision:
            return rollback(reason, name=name, store=store)

        @property
        def champion(self) -> int | None:
            now = champion(name, store=store)
            return now and now.version

        @property
        def outcomes(self) -> list[str]:
            return decisions(name, store=store).outcome.tolist()

    World.store, World.name, World.exam = store, name, exam
    return World()


# --- the exam --------------------------------------------------------------------------------------------------------


@slow(max_examples=25, deadline=None)
@given(st.integers(10, 300), st.integers(0, 5))
def test_a_row_stays_on_its_side_however_the_data_grows(n, seed):
    data = table(300, seed)
    _, all_aside = hold_out(data, ["a", "b"])
    rest, aside = hold_out(data.sample(n, random_state=seed), ["a", "b"])
    assert len(rest) + len(aside) == n
    assert set(aside.a) <= set(all_aside.a)
    assert not set(rest.a) & set(all_aside.a)


def test_about_the_asked_share_is_set_aside():
    _, aside = hold_out(table(5_000, 9), ["a"], share=0.3)
    assert 0.27 < len(aside) / 5_000 < 0.33


def test_an_exam_is_named_by_its_content_and_the_last_one_counts():
    first, second = freeze_exam(EXAM, "label", "content"), freeze_exam(EXAM.head(200), "label", "content")
    assert first.version != second.version
    assert load_exam("content").version == second.version
    assert freeze_exam(EXAM, "label", "content").version == first.version
    assert load_exam("content").version == first.version
    pd.testing.assert_frame_equal(load_exam("content", second.version[:12]).frame, EXAM.head(200), check_dtype=False)


def test_models_with_like_names_have_exams_of_their_own():
    a, b = freeze_exam(EXAM, "label", "like-name"), freeze_exam(EXAM.head(50), "label", "like_name")
    assert load_exam("like-name").version == a.version
    assert load_exam("like_name").version == b.version


def test_a_useless_exam_is_refused():
    with pytest.raises(RegistryError, match="stars"):
        freeze_exam(EXAM, "stars", "useless")
    with pytest.raises(RegistryError, match="0 rows"):
        freeze_exam(EXAM.head(0), "label", "useless")
    with pytest.raises(RegistryError, match="freeze_exam"):
        load_exam("useless")


# --- the tests -------------------------------------------------------------------------------------------------------

answers = st.lists(st.tuples(*[st.sampled_from("abc")] * 3), min_size=1, max_size=60)


@slow(max_examples=60, deadline=None)
@given(answers)
def test_mcnemar_is_the_exact_binomial_and_turns_round(rows):
    truth, old, new = (np.array(v) for v in zip(*rows, strict=True))
    only_old, only_new, p = mcnemar(truth, old, new)
    n = only_old + only_new
    assert p == pytest.approx(binom.sf(only_new - 1, n, 0.5) if n else 1.0)
    assert mcnemar(truth, new, old)[:2] == (only_new, only_old)
    assert (only_new - only_old) / len(rows) == pytest.approx((new == truth).mean() - (old == truth).mean())


@slow(max_examples=25, deadline=None)
@given(answers)
def test_equal_answers_differ_by_nothing(rows):
    truth, old, _ = zip(*rows, strict=True)
    assert not paired_bootstrap(truth, old, old, draws=20).any()


@pytest.mark.parametrize("metric", ["accuracy", "f1_weighted", "f1_macro", "f1_1"])
def test_the_bootstrap_agrees_with_redrawing_rows_one_by_one(metric):
    rng = np.random.default_rng(0)
    truth = rng.choice(3, 500, p=[0.2, 0.2, 0.6])
    old = np.where(rng.random(500) < 0.7, truth, rng.choice(3, 500))
    new = np.where(rng.random(500) < 0.8, truth, rng.choice(3, 500))

    def score(t, p):
        if metric == "accuracy":
            return accuracy_score(t, p)
        if metric == "f1_1":
            return f1_score(t, p, average=None)[1]
        return f1_score(t, p, average=metric.removeprefix("f1_"))

    draws = [rng.integers(0, 500, 500) for _ in range(600)]
    slow_way = np.array([score(truth[k], new[k]) - score(truth[k], old[k]) for k in draws])
    fast_way = paired_bootstrap(truth, old, new, metric)
    assert fast_way.mean() == pytest.approx(slow_way.mean(), abs=0.004)
    assert fast_way.std() == pytest.approx(slow_way.std(), rel=0.15)


def test_a_gate_lets_few_lucky_models_through():
    rng, passed = np.random.default_rng(3), 0
    for _ in range(200):
        truth = rng.integers(0, 3, 300)
        old, new = (np.where(rng.random(300) < 0.75, truth, rng.integers(0, 3, 300)) for _ in range(2))
        d = paired_bootstrap(truth, old, new, draws=800)
        passed += (1 + (d <= 0).sum()) / 801 < 0.05
    assert passed <= 20, f"{passed} of 200 equal models passed at alpha = 0.05"


# --- promotion -------------------------------------------------------------------------------------------------------


def test_the_first_model_needs_only_its_targets(world):
    world.add("good")
    d = world.promote()
    assert d.passed
    assert d.applied
    assert world.champion == 1
    assert d.before is None
    assert "challenger" not in find(1, world.name, store=world.store).aliases
    assert world.outcomes == ["promoted"]


def test_a_first_model_below_its_targets_is_refused(world):
    world.add("ambitious")
    d = world.promote()
    assert not d.passed
    assert world.champion is None
    assert "0.999" in d.reason


def test_a_worse_model_changes_nothing(world):
    world.add("good"), world.promote(), world.add("poor")
    before = versions(world.name, store=world.store)
    d = world.promote()
    assert not d.passed
    assert not d.applied
    pd.testing.assert_frame_equal(before, versions(world.name, store=world.store))
    assert world.outcomes == ["promoted", "refused"]


def test_a_better_model_replaces_the_champion(world):
    world.add("poor")
    assert world.promote(gate=Gate(targets={})).passed
    world.add("good")
    d = world.promote()
    assert d.passed
    assert d.before == 1
    assert world.champion == 2
    assert d.metrics["accuracy"] > d.champion_metrics["accuracy"]


def test_an_equal_model_is_not_better_but_not_worse_either(world):
    world.add("good"), world.promote(), world.add("good")
    assert not world.promote().passed
    assert not world.promote(gate=Gate(rule="not worse", margin=0.0)).passed, "a margin of 0 asks for more"
    assert world.promote(gate=Gate(rule="not worse", margin=0.01)).passed


def test_a_margin_is_asked_on_top(world):
    world.add("poor"), world.promote(gate=Gate(targets={})), world.add("good")
    assert not world.promote(gate=Gate(margin=0.9)).passed
    assert world.promote(gate=Gate(margin=0.01)).passed


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "auc_roc", "log_loss"])
def test_the_gate_judges_by_the_metric_it_was_given(world, metric):
    world.add("poor"), world.promote(gate=Gate(targets={})), world.add("good")
    d = world.promote(gate=Gate(metric=metric))
    assert d.passed
    assert metric in d.reason
    assert "+" in d.reason, "a positive difference speaks for the new model, also where lower is better"


def test_an_unknown_metric_refuses_with_the_names(world):
    world.add("poor"), world.promote(gate=Gate(targets={})), world.add("good")
    assert "f1_weighted" in world.promote(gate=Gate(metric="karma")).reason
    assert not world.promote(gate=Gate(targets={"karma": 1.0})).passed


@pytest.mark.parametrize("wrong", [{"rule": "best"}, {"margin": -1}, {"alpha": 0}, {"alpha": 0.7}])
def test_a_gate_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(RegistryError, match=next(iter(wrong))):
        Gate(**wrong)


def test_promoting_the_champion_again_is_refused(world):
    world.add("good"), world.promote()
    assert "champion already" in world.promote(1).reason
    assert world.champion == 1


def test_a_version_that_does_not_exist_is_an_error_and_no_decision(world):
    with pytest.raises(RegistryError, match="no version"):
        world.promote(7)
    assert world.outcomes == []


def test_force_needs_a_reason_and_keeps_it(world):
    world.add("good"), world.promote(), world.add("poor")
    with pytest.raises(RegistryError, match="why"):
        world.promote(force="  ")
    d = world.promote(force="the good one is too slow", who="Ada")
    assert d.applied
    assert not d.passed
    assert world.champion == 2
    last = decisions(world.name, store=world.store).iloc[-1]
    assert (last.outcome, last.who) == ("forced", "Ada")
    assert "too slow" in last.reason


# --- honest exams ----------------------------------------------------------------------------------------------------


def test_rows_that_a_model_was_trained_on_do_not_count(world):
    world.add("good"), world.add("cheat")
    cheat, good = find(2, world.name, store=world.store), find(1, world.name, store=world.store)
    fair = unseen(world.exam, cheat)
    assert unseen(world.exam, good).all()
    assert 0 < (~fair).sum() < len(fair)
    assert compare(good, cheat, world.exam).seen == (~fair).sum(), "for both models, whichever has seen them"


def test_a_champion_that_has_read_the_exam_gains_nothing(world):
    world.add("cheat"), world.promote(force="it was here first")
    world.add("good")
    d = world.promote()
    assert "do not count" in d.checks[0].found
    assert d.champion_metrics


def test_too_few_fair_rows_are_no_exam(world):
    world.add("cheat")
    d = world.promote(gate=Gate(min_rows=399))
    assert not d.passed
    assert "fair" in d.reason


def test_unknown_training_rows_are_not_taken_for_fair(world):
    world.add("blind")
    d = world.promote()
    assert not d.passed
    assert "training_rows" in d.reason


def test_other_columns_than_the_exam_has_are_named(world):
    world.add("good"), world.promote(), world.add("other columns")
    d = world.promote()
    assert not d.passed
    assert "'d'" in d.reason
    assert world.champion == 1


def test_a_champion_on_other_columns_can_be_replaced_by_force_only(world):
    world.add("other columns"), world.promote(force="first")
    world.add("good")
    assert "'d'" in world.promote().reason
    assert world.promote(force="the exam has changed").applied


def forget_names(world, version: int, tmp_path) -> None:
    "Make the record of a version one from before runs kept what names a row."
    found = find(version, world.name, store=world.store)
    kept = {name: value for name, value in found.report.items() if name != "named_by"}
    (tmp_path / "report.json").write_text(json.dumps(kept))
    world.store.log_artifact(found.run_id, str(tmp_path / "report.json"))


def own_run(world, data: pd.DataFrame, target: str = "label") -> int:
    done = train("logistic", data, target, targets={}, params={"chars": 0, "shift": False})
    return register(log_run(done, data, store=world.store), world.name, store=world.store)


def test_a_record_that_does_not_say_what_names_a_row_is_not_taken_for_fair(world, tmp_path):
    forget_names(world, own_run(world, ROWS), tmp_path)
    with pytest.raises(RegistryError, match="train it again"):
        unseen(world.exam, find(1, world.name, store=world.store))
    d = world.promote()
    assert not d.passed
    assert "train it again" in d.reason
    assert world.outcomes == ["refused"]


def test_a_champion_with_an_older_record_is_no_crash_and_the_reason_says_what_to_do(world, tmp_path):
    own_run(world, ROWS), world.promote(force="first")
    forget_names(world, 1, tmp_path)
    world.add("good")
    d = world.promote()
    assert not d.passed
    assert "another name" in d.reason
    assert "force" in d.reason
    assert d.metrics["accuracy"] > 0.6, "the challenger was examined all the same"
    with pytest.raises(RegistryError, match="train it again"):
        compare(2, 1, world.exam, name=world.name, store=world.store)
    assert world.promote(force="the old record cannot be compared").applied
    assert world.champion == 2


def test_a_champion_of_messages_with_a_column_that_new_ones_lack_is_decided_upon(world):
    rng = np.random.default_rng(6)
    words = ["good", "bad", "fine", "slow", "fast", "refund", "broken", "love", "hate", "late", "great", "rude"]
    rows = pd.DataFrame({"text": [" ".join(rng.choice(words, 8)) for _ in range(500)]})
    rows["label"] = rows.text.str.contains("good|love").astype(int)
    own_run(world, rows.head(250).assign(category_encoded=rng.integers(0, 9, 250))), world.promote(force="first")
    exam = freeze_exam(rows.tail(250), "label", world.name)
    own_run(world, rows.head(250))
    d = world.promote(exam=exam)
    assert not d.applied
    assert "category_encoded" in d.reason
    assert "another name" in d.reason
    assert d.metrics, "the challenger was examined all the same"
    assert not d.champion_metrics
    assert world.champion == 1


def test_another_target_is_refused(world):
    world.add("good")
    exam = freeze_exam(EXAM.rename(columns={"label": "answer"}), "answer", world.name)
    assert "answer" in world.promote(exam=exam).reason


def test_without_an_exam_nothing_is_promoted(runs_of):
    store, kinds = runs_of
    register(kinds["good"], "no exam", store=store)
    d = promote(name="no exam", store=store)
    assert not d.passed
    assert "freeze_exam" in d.reason
    assert champion("no exam", store=store) is None


def test_a_champion_whose_files_are_gone_refuses_and_says_so(world, monkeypatch):
    world.add("good"), world.promote(), world.add("poor")
    real = gates.load_model

    def load(where, **more):
        if where.endswith("/1"):
            raise gates.RegistryError("the files are gone")
        return real(where, **more)

    monkeypatch.setattr(gates, "load_model", load)
    assert any("files are gone" in c.found for c in world.promote().checks)


# --- rollback and aliases --------------------------------------------------------------------------------------------


def test_rollbacks_go_back_step_by_step(world):
    for _ in range(3):
        world.add("good"), world.promote(force="next")
    assert world.champion == 3
    assert world.rollback().version == 2
    assert world.rollback().version == 1
    with pytest.raises(RegistryError, match="before"):
        world.rollback()
    assert world.champion == 1
    assert world.outcomes[-1] == "rolled back"


def test_after_a_rollback_the_way_forward_is_new(world):
    for _ in range(3):
        world.add("good"), world.promote(force="next")
    world.rollback()
    world.promote(3, force="again")
    world.rollback()
    assert world.champion == 2
    world.rollback()
    assert world.champion == 1


def test_a_deleted_version_is_not_gone_back_to(world):
    for _ in range(3):
        world.add("good"), world.promote(force="next")
    world.store.delete_model_version(world.name, "2")
    assert world.rollback().version == 1


def test_an_alias_moved_behind_our_back_can_be_rolled_back(world):
    world.add("good"), world.promote(), world.add("poor")
    world.store.set_registered_model_alias(world.name, "champion", "2")
    assert world.rollback().version == 1


def test_there_is_nothing_to_roll_back_at_first(world):
    with pytest.raises(RegistryError, match="no champion"):
        world.rollback()


def test_moving_champion_by_hand_is_a_decision_other_aliases_are_not(world):
    world.add("good"), world.add("poor")
    moved = set_alias("champion", 1, "the registry was moved", name=world.name, who="Ada", store=world.store)
    assert "champion" in moved.aliases
    set_alias("canary", 2, "a try", name=world.name, store=world.store)
    assert world.outcomes == ["set by hand"]
    assert find("canary", world.name, store=world.store).version == 2


@slow(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(["promote", "force", "rollback"]), min_size=1, max_size=6))
def test_the_alias_is_what_the_decisions_say(runs_of, actions):
    store, kinds = runs_of
    name = f"law-{next(counter)}"
    exam = freeze_exam(EXAM, "label", name)
    stack: list[int] = []
    for k, action in enumerate(actions):
        if action == "rollback":
            if len(stack) < 2:
                with pytest.raises(RegistryError):
                    rollback("law", name=name, store=store)
                continue
            rollback("law", name=name, store=store)
            stack.pop()
        else:
            version = register(kinds["good" if k % 2 else "poor"], name, store=store)
            if promote(version, exam, name=name, force="law" if action == "force" else None, store=store).applied:
                stack.append(version)
        now = champion(name, store=store)
        assert (now.version if now else None) == (stack[-1] if stack else None)


# --- decisions that are broken off -----------------------------------------------------------------------------------


def test_a_decision_is_written_before_the_alias_moves(world, monkeypatch):
    world.add("good")

    def broken(*args, **kwargs):
        assert world.outcomes == ["unfinished"], "the decision stands in the store before anything changes"
        raise MlflowException("disk full")

    monkeypatch.setattr(world.store, "set_registered_model_alias", broken)
    with pytest.raises(MlflowException):
        world.promote()
    assert world.champion is None
    assert world.outcomes == ["broken off"]


@pytest.fixture(params=[True, False], ids=["moved", "not moved"])
def moved(request, world, monkeypatch) -> bool:
    "A promotion was killed before its run was closed: after the alias moved, or before."
    world.add("good")
    with monkeypatch.context() as m:
        m.setattr(world.store, "set_terminated", lambda *a: None)
        if not request.param:
            m.setattr(world.store, "set_registered_model_alias", lambda *a: None)
        world.promote()
    return request.param


def test_a_process_that_died_in_between_is_found_out(world, moved):
    assert world.outcomes == ["unfinished"]
    world.add("poor"), world.promote()
    assert world.outcomes == ["promoted" if moved else "broken off", "refused"] or not moved
    assert world.outcomes[0] == ("promoted" if moved else "broken off")


def test_a_champion_that_changed_meanwhile_stops_the_promotion(world, monkeypatch):
    world.add("poor"), world.promote(gate=Gate(targets={})), world.add("good")
    real = gates._write

    def write(store, d):
        store.set_registered_model_alias(world.name, "champion", "2")  # another machine, behind our back
        return real(store, d)

    monkeypatch.setattr(gates, "_write", write)
    with pytest.raises(RegistryError, match="changed"):
        world.promote()
    assert world.outcomes[-1] == "broken off"


def test_concurrent_promotions_are_judged_one_after_the_other(world):
    numbers = [world.add("good") for _ in range(4)]
    gate = Gate(rule="not worse", margin=0.01)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda v: world.promote(v, gate=gate), numbers))
    assert all(d.applied for d in made)
    chain = {d.before: d.version for d in made}
    now, seen = None, []
    while now in chain:
        now = chain[now]
        seen.append(now)
    assert sorted(seen) == numbers, "each was judged against the champion that the one before it had become"
    assert world.champion == seen[-1]


# --- who was champion then -------------------------------------------------------------------------------------------


def now_and_on() -> datetime:
    "This moment; every later decision has a later time."
    now = datetime.now(UTC)
    while datetime.now(UTC) - now < timedelta(milliseconds=2):
        time.sleep(0.0005)
    return now


def then(world, at) -> int | None:
    found = champion(world.name, at, store=world.store)
    return found and found.version


def test_the_champion_of_any_moment_is_known(world):
    moments, expected = [datetime(2020, 1, 1, tzinfo=UTC), now_and_on()], [None, None]

    def note():
        moments.append(now_and_on())
        expected.append(world.champion)

    world.add("good")
    note()
    for kind, how in (("good", {}), ("poor", {}), ("poor", {"force": "a drill"})):
        world.add(kind)
        world.promote(**how)
        note()
    world.rollback()
    note()
    set_alias("champion", 3, "by hand", name=world.name, store=world.store)
    note()
    assert expected[2:] == [None, 2, 2, 4, 2, 3]
    assert [then(world, m) for m in moments] == expected
    zone = timezone(timedelta(hours=9))
    assert [then(world, m.astimezone(zone).isoformat()) for m in moments] == expected, "any zone, as text too"
    assert then(world, pd.Timestamp(moments[-1])) == 3


def test_a_moment_without_a_zone_or_not_yet_come_is_refused(world):
    world.add("good"), world.promote()
    naive = datetime.now(UTC).replace(tzinfo=None)
    for odd, says in ((naive, "no time zone"), (naive.isoformat(), "no time zone"), ("last Monday", "no time"),
                      (datetime.now(UTC) + timedelta(hours=1), "not come yet")):  # fmt: skip
        with pytest.raises(RegistryError, match=says):
            then(world, odd)


def test_a_model_that_is_not_there_is_an_error_when_asked_about_the_past(world):
    with pytest.raises(RegistryError, match="no registered model 'nobody'"):
        champion("nobody", datetime.now(UTC), store=world.store)
    world.add("good")
    assert then(world, datetime.now(UTC)) is None, "registered, never promoted"


def test_an_alias_moved_without_a_decision_leaves_a_gap_that_is_said(world):
    world.add("good"), world.add("good")
    early = now_and_on()
    world.store.set_registered_model_alias(world.name, "champion", "1")
    with pytest.raises(RegistryError, match="Before .* from none to version 1 without a decision"):
        then(world, early)
    world.promote(2)  # refused: no better than its twin; it saw version 1
    known = now_and_on()
    assert then(world, known) == 1
    world.store.set_registered_model_alias(world.name, "champion", "2")
    gap = now_and_on()
    for at in (known, gap):
        with pytest.raises(RegistryError, match="from version 1 to version 2 without a decision"):
            then(world, at)
    world.promote(1)
    assert then(world, now_and_on()) == 2


def test_a_decision_that_was_cut_off_counts_as_what_happened(world, moved):
    assert then(world, now_and_on()) == (1 if moved else None)


def test_a_version_deleted_since_is_named(world):
    world.add("good"), world.add("good")
    world.promote(1)
    at = now_and_on()
    world.promote(2, force="a drill")
    world.store.delete_model_version(world.name, "1")
    with pytest.raises(RegistryError, match="no version '1'"):
        then(world, at)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_show_what_is_there(world):
    assert decisions("nobody", store=world.store).empty
    assert versions("nobody", store=world.store).empty
    world.add("good"), world.promote(), world.add("poor"), world.promote()
    row = models(store=world.store).set_index("name").loc[world.name]
    assert (row.champion, row.challenger) == (1, 2)
    table = decisions(world.name, store=world.store)
    assert table.exam.unique().tolist() == [world.exam.version[:8]]
    assert table.loc[1, "accuracy" if "accuracy" in table else "f1_weighted"] > 0
    assert table["champion's f1_weighted"].isna().tolist() == [True, False]
    assert versions(world.name, store=world.store).aliases.tolist() == ["challenger", "champion"]


def test_names_with_quotes_and_odd_texts(runs_of):
    store, kinds = runs_of
    name = "Ann's model"
    register(kinds["good"], name, store=store)
    d = promote(1, freeze_exam(EXAM, "label", name), name=name, who="<b>Ann</b>", store=store)
    assert d.applied
    assert decisions(name, store=store).outcome.tolist() == ["promoted"]
    assert "<b>Ann</b>" not in d._repr_html_()


def test_a_regression_is_compared_by_its_error(runs_of):
    store, _ = runs_of
    rng = np.random.default_rng(0)
    data = pd.DataFrame(rng.normal(size=(700, 2)).round(6), columns=["a", "b"])
    data["y"] = 3 * data.a + data.b + 0.3 * rng.normal(size=700)
    exam = freeze_exam(data.tail(200), "y", "price")
    for columns in (["b", "y"], ["a", "b", "y"]):
        rows = data.head(500)[columns]
        register(log_run(train("ridge", rows, "y", targets={"rmse": 9.0}), rows, store=store), "price", store=store)
    assert promote(1, exam, name="price", store=store).passed
    d = promote(2, exam, name="price", store=store)
    assert d.passed
    assert d.reason.startswith("rmse +")


def test_a_message_is_recognised_though_its_features_are_computed_differently(runs_of):
    store, _ = runs_of
    rng = np.random.default_rng(5)
    words = ["good", "bad", "fine", "slow", "fast", "refund", "broken", "love", "hate", "late", "great", "rude"]
    rows = pd.DataFrame({"text": [" ".join(rng.choice(words, 8)) for _ in range(400)]})
    rows["length"] = rows.text.str.len()
    rows["label"] = rows.text.str.contains("good|love").astype(int)
    done = train("logistic", rows.head(200), "label", targets={}, params={"chars": 0, "shift": False})
    register(log_run(done, rows.head(200), store=store), "letters", store=store)
    train_rows = np.setdiff1d(np.arange(200), done.test_index)
    exam = freeze_exam(rows.assign(length=rows.length / 100), "label", "letters")
    fair = unseen(exam, find(1, "letters", store=store))
    assert not fair[train_rows].any()
    assert fair[200:].sum() >= 195, "only a text that occurs twice may be taken for seen"
