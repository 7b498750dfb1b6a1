"""The store of tuned kernels: whole whoever writes it, read at once, and refused in words where it can't be read."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sparsify.errors import InputError
from sparsify.runtime import tuned, tunings
from sparsify.runtime.tunings import Tuned

ENTRY = Tuned("m", "s", "cpp", "k0", {"blocks": 12}, 0.9, 1.0, 0.9, 0.88, 0.92, "2026-01-01T00:00:00+00:00")
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("SPARSIFY_TUNED", str(path))
    tuned.reload()
    yield path
    tuned.reload()


def _write(path: Path, first: int, count: int) -> None:
    for number in range(first, first + count):
        tunings.merge(path, [replace(ENTRY, kernel=f"k{number}")])


def _write_for_ever(path: Path) -> None:
    many = [replace(ENTRY, kernel=f"forever{number}") for number in range(2000)]
    while True:
        tunings.merge(path, many)


def test_what_is_kept_is_read_at_once_and_by_later_processes(store):
    assert tuned.lookup(ENTRY.key) == {}
    before = tuned.token()
    assert tuned.keep([ENTRY]) == store
    assert tuned.lookup(ENTRY.key) == {"blocks": 12} and tuned.token() != before
    assert tunings.read(store) == {ENTRY.key: ENTRY}


def test_the_file_is_looked_at_once_a_process_and_again_when_asked(store):
    tuned.keep([ENTRY])
    assert tuned.lookup(ENTRY.key)
    tunings.merge(store, [replace(ENTRY, values={"blocks": 8}, measured="2026-02-01T00:00:00+00:00")])
    assert tuned.lookup(ENTRY.key) == {"blocks": 12}
    tuned.reload()
    assert tuned.lookup(ENTRY.key) == {"blocks": 8}


def test_what_was_measured_last_stays(store):
    early, late = (replace(ENTRY, values={"blocks": n}, measured=f"2026-0{n}-01T00:00:00+00:00") for n in (4, 6))
    for order in ([early, late], [late, early]):
        tunings.merge(store, order)
        assert tunings.read(store)[ENTRY.key] == late


def test_forced_values_come_before_the_store(store):
    tuned.keep([ENTRY])
    with tuned.forced({"blocks": 24}):
        inside = tuned.token()
        assert tuned.lookup(ENTRY.key) == {"blocks": 24}
        with tuned.forced({}):
            assert tuned.lookup(ENTRY.key) == {}
        assert tuned.token() == inside
    assert tuned.lookup(ENTRY.key) == {"blocks": 12} and tuned.token() != inside


def test_0_is_no_store(store, monkeypatch):
    tuned.keep([ENTRY])
    monkeypatch.setenv("SPARSIFY_TUNED", "0")
    assert tuned.lookup(ENTRY.key) == {}
    with pytest.raises(InputError, match=r"^environment variable SPARSIFY_TUNED: found '0', so there is no store"):
        tuned.keep([ENTRY])


def test_concurrent_writers_lose_nothing(store):
    writers = [SPAWN.Process(target=_write, args=(store, 100 * n, 25)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(tunings.read(store)) == 100


def test_a_writer_that_is_killed_leaves_a_whole_store(store):
    tunings.merge(store, [ENTRY])
    for wait in (0.05, 0.1, 0.15):
        writer = SPAWN.Process(target=_write_for_ever, args=(store,))
        writer.start()
        while len(tunings.read(store)) == 1 or not list(store.parent.glob("*.part")):
            time.sleep(0.001)  # until it is in the middle of it
        time.sleep(wait)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert tunings.read(store)[ENTRY.key] == ENTRY
        tunings.merge(store, [replace(ENTRY, kernel=f"after{wait}")])  # no lock is left behind
    assert len(tunings.read(store)) == 2004


WRONG = {
    "not json": ("{", "no store of tuned kernels: it is not JSON (Expecting property name"),
    "no list": ('{"version": 1}', "no store of tuned kernels: expected an object with 'version' and a list 'tuned'"),
    "another version": ('{"version": 2, "tuned": []}', "store version 2 can't be read by this sparsify (it reads 1)"),
    "no fields": ('{"version": 1, "tuned": [{}]}', "tuned[0]: expected an object with machine, software, target,"),
    "no text": (asdict(ENTRY) | {"machine": 3}, "tuned[0]: machine: found 3; expected text"),
    "no number": (asdict(ENTRY) | {"ratio": "x"}, "tuned[0]: ratio: found 'x'; expected a number"),
    "not finite": (asdict(ENTRY) | {"seconds": float("nan")}, "tuned[0]: seconds: found nan; expected a number above"),
    "negative": (asdict(ENTRY) | {"default": -1.0}, "tuned[0]: default: found -1.0; expected a number above 0"),
    "no date": (asdict(ENTRY) | {"measured": "today"}, "tuned[0]: measured: found 'today'; expected a time in UTC"),
    "no zone": (asdict(ENTRY) | {"measured": "2026-01-01T00:00:00"}, "tuned[0]: measured: found '2026-01-01T00:00:00'"),
    "a key twice": ('{"version": 1, "version": 1, "tuned": []}', "the key 'version' is given twice"),
    "no integer": (asdict(ENTRY) | {"values": {"blocks": 1.5}}, "tuned[0]: values: blocks: found 1.5; expected an int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_words_and_ignored_by_kernels(store, name):
    content, message = WRONG[name]
    store.write_text(content if isinstance(content, str) else json.dumps({"version": 1, "tuned": [content]}))
    with pytest.raises(InputError) as raised:
        tunings.read(store)
    assert str(raised.value).startswith(f"{store}: {message}")
    with pytest.warns(RuntimeWarning) as warned:
        assert tuned.lookup(ENTRY.key) == {} and tuned.held() == ({}, str(raised.value))
        assert tuned.lookup(("a", "b", "c", "d")) == {}
    what = "kernels run as they do by default; remove it and tune again, or set SPARSIFY_TUNED to another file or 0"
    assert [str(one.message) for one in warned] == [f"{raised.value}; {what}"]  # once, however often it is asked


def test_a_file_that_is_not_there(store):
    with pytest.raises(InputError, match=r"can't be read: No such file or directory$"):
        tunings.read(store)
    assert tuned.held() == ({}, "")


def test_a_store_that_can_not_be_read_is_put_aside_when_something_is_kept(store):
    store.write_text('{"version": 2, "tuned": []}')
    tuned.keep([ENTRY])
    assert tunings.read(store) == {ENTRY.key: ENTRY}
    assert json.loads(store.with_name("tuned.json.unread").read_text())["version"] == 2


def test_a_folder_that_can_not_be_written_is_named(store, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TUNED", "/proc/nowhere/tuned.json")
    with pytest.raises(InputError, match=r"^/proc/nowhere/tuned.json: the store of tuned kernels can't be written: "):
        tuned.keep([ENTRY])
