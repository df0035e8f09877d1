"""Who judges what: overlap, tabs, undo, several processes, and data that is not the same any more."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.judgments import read_judgments
from preftune.data.types import Example
from preftune.errors import DataError, StorageError
from preftune.files import write_atomic
from preftune.web.results import jsonl, results
from preftune.web.store import CHOICES, Choice, Given, Store


def examples(n: int, k: int = 2) -> list[Example]:
    return [Example(f"e{i}", f"question {i}", tuple(f"answer {i} {j}" for j in range(k))) for i in range(n)]


def say(store: Store, who: str, item: int, choice: Choice = "left", key: str = "", **more: object) -> bool:
    return store.judge(who, Given(key or f"{who}{item}", item, choice, "clear", "", 1.0)._replace(**more))


def work(store: Store, who: str, tab: str = "1", most: int = 10**6) -> list[int]:
    """Judges all that is given to somebody; the pairs in their order."""
    done = []
    while len(done) < most and (task := store.next(who, tab=tab)) is not None:
        say(store, who, task.item)
        done.append(task.item)
    return done


@pytest.mark.parametrize(("overlap", "people"), [(1, 1), (1, 3), (2, 3), (3, 3), (4, 3)])
def test_each_pair_gets_as_many_judgments_as_are_wanted(tmp_path: Path, overlap: int, people: int) -> None:
    """Nobody judges a pair twice, and no pair is judged more often than asked, whoever comes first."""
    store = Store.open(tmp_path / "a.db", examples(11), overlap=overlap)
    left = {f"p{i}" for i in range(people)}
    while left:
        left = {who for who in sorted(left) if work(store, who, most=2)}
    counts = Counter((j.example, j.i, j.j) for j in store.judgments())
    assert set(counts.values()) == {min(overlap, people)} and len(counts) == 11
    assert max(Counter((j.example, j.annotator) for j in store.judgments()).values()) == 1
    assert store.progress("p0").left == (0 if overlap <= people else 0)


def test_sides_are_shuffled_and_stay(tmp_path: Path) -> None:
    """Which answer is on the left is drawn per annotator and pair, evenly, and is the same after a reload."""
    store = Store.open(tmp_path / "a.db", examples(400))
    swapped = [store.task(i, "ada").left for i in range(400)]
    assert 150 < sum(swapped) < 250
    assert swapped != [store.task(i, "bob").left for i in range(400)]
    assert swapped == [Store.open(tmp_path / "b.db", examples(400)).task(i, "ada").left for i in range(400)]
    assert [t.item for t in (store.next("ada", tab="1"), store.next("ada", tab="1")) if t] == [
        store.next("ada", tab="1").item
    ] * 2


def test_a_verdict_names_the_answer_and_not_the_side(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a.db", examples(50))
    for item in range(50):
        task = store.task(item, "ada")
        say(store, "ada", item, "left" if task.left == 1 else "right", strength="slight")
    said = store.judgments()
    assert {j.verdict for j in said} == {"j"}, "response 1 was chosen wherever it stood"
    assert {j.shown_order for j in said} == {(0, 1), (1, 0)}
    assert {j.strength for j in said} == {"slight"}


def test_all_pairs_of_more_than_two_answers(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a.db", [*examples(1, k=4), Example("lone", "q", ("one answer",))])
    tasks = [store.task(i, "a") for i in range(6)]
    assert [tuple(sorted((t.left, t.right))) for t in tasks] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert len(work(store, "ada")) == 6


def test_tabs_get_different_pairs_and_a_pair_is_judged_once(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a.db", examples(3), overlap=2)
    one, two = store.next("ada", tab="1"), store.next("ada", tab="2")
    assert one and two and one.item != two.item
    assert say(store, "ada", one.item, "left", key="x")
    assert say(store, "ada", one.item, "left", key="x"), "the same judgment again: it is there"
    assert not say(store, "ada", one.item, "right", key="y"), "another one on the same pair: the first counts"
    assert len(store.judgments()) == 1


def test_a_pair_on_a_screen_is_not_given_to_somebody_else(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a.db", examples(1))
    assert store.next("ada", tab="1")
    assert store.next("bob", tab="1") is None
    say(store, "ada", 0, "skip")
    assert store.next("ada", tab="1") is None, "skipped: not shown again"
    task = store.next("bob", tab="1")
    assert task and task.item == 0, "a skipped pair still wants a judgment"
    assert store.progress("ada") == (0, 1, 0, 1.0)


def test_undo_withdraws_and_asks_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a.db", examples(3))
    assert store.undo("ada", tab="1") is None
    done = work(store, "ada", most=2)
    task = store.undo("ada", tab="1")
    assert task and task.item == done[-1]
    assert len(store.judgments()) == 1
    again = store.next("ada", tab="1")
    assert again and again.item == done[-1]
    say(store, "ada", done[-1], "tie", key="second thought")
    assert [j.verdict for j in store.judgments()][-1] == "tie"
    with sqlite3.connect(tmp_path / "a.db") as db:
        assert db.execute("SELECT COUNT(*) FROM judgments").fetchone() == (3,), "what was withdrawn is still there"


def test_two_processes_on_one_file(tmp_path: Path) -> None:
    """What one stores the other sees before it gives out the next pair."""
    one, two = (Store.open(tmp_path / "a.db", examples(4)) for _ in range(2))
    assert len(work(one, "ada", most=3)) == 3
    assert len(work(two, "bob")) == 1
    assert one.next("ada", tab="1") is None
    assert len(one.judgments()) == 4


def test_data_may_grow_but_not_change(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a.db", examples(3))
    work(store, "ada")
    store.close()
    assert len(work(Store.open(tmp_path / "a.db", examples(5)), "ada")) == 2
    changed = examples(5)
    changed[1] = Example("e1", "question 1", ("answer 1 0", "another text"))
    with pytest.raises(DataError, match="1 judgments are on answers that this data does not have"):
        Store.open(tmp_path / "a.db", changed)


def test_what_is_no_file_of_judgments(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, and longer than the hundred bytes of a header " * 4)
    with pytest.raises(StorageError, match=r"text\.db: cannot be used as the file of judgments"):
        Store.open(tmp_path / "text.db", examples(2))
    with pytest.raises(DataError, match="nothing to compare"):
        Store.open(tmp_path / "a.db", [Example("e", "q", ("one",))])


@given(
    st.lists(
        st.tuples(st.sampled_from(["ada", "bob"]), st.sampled_from([*CHOICES, "undo"]), st.sampled_from("12")), max_size=30
    )
)
def test_counts_follow_from_what_stands(acts: list[tuple[str, str, str]]) -> None:
    """Whatever is said and taken back, memory and file agree, and nobody has two judgments on a pair."""
    store = Store(_memory(), Path("memory"), examples(4), overlap=2, seed=0)
    for n, (who, what, tab) in enumerate(acts):
        if what == "undo":
            store.undo(who, tab=tab)
        elif task := store.next(who, tab=tab):
            assert say(store, who, task.item, what, key=str(n))  # type: ignore[arg-type]
    said = store.judgments()
    for item, (at, i, j) in enumerate(store.items):
        assert store._count[item] == sum((s.example, s.i, s.j) == (store.examples[at].id, i, j) for s in said) <= 2
    for who in ("ada", "bob"):
        assert store.progress(who).done == sum(s.annotator == who for s in said)


def _memory() -> sqlite3.Connection:
    from preftune.web.store import _SCHEMA

    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(_SCHEMA)
    return db


def test_results_and_export(tmp_path: Path) -> None:
    """The export is what the readers of judgments read; results count and name the pairs on which people differ."""
    store = Store.open(tmp_path / "a.db", examples(6), overlap=2)
    for who in ("ada", "bob"):
        for item in range(6):
            task = store.task(item, who)
            first = "left" if task.left == 0 else "right"
            say(store, who, item, "tie" if who == "bob" and item == 0 else first, why="because <b>" if item == 0 else "")  # type: ignore[arg-type]
    write_atomic(tmp_path / "j.jsonl", jsonl(store.judgments()))
    assert read_judgments(tmp_path / "j.jsonl") == store.judgments()
    found = results(store)
    assert (found.n_pairs, found.n_finished, found.more) == (6, 6, 0)
    assert found.agreement.percent.value == pytest.approx(5 / 6)
    assert [d.said for d in found.disagreements] == [[("ada", "the first", "because <b>"), ("bob", "a tie", "because <b>")]]
