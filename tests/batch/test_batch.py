"""`htc-vlm batch`: every row once, whatever is broken and however often it is killed; both engines give the same rows."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import multiprocessing
import os
import sqlite3
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from htc_vlm import ImageStore
from htc_vlm.batch import local, questions, steps
from htc_vlm.batch.journal import Journal
from htc_vlm.batch.questions import Questions, read
from htc_vlm.batch.run import run
from htc_vlm.batch.sources import Ref, refs_of
from htc_vlm.batch.steps import Columns, Settings
from htc_vlm_cli import main

from .. import tinies
from .. import tiny_runs as tiny

ASKED = Questions(["what is it ?", "how many ?"])
BROKEN = ("p3.png", "p5.png")


def folder_of(path: Path, n: int = 7) -> Path:
    """n pictures, two of them broken."""
    path.mkdir(parents=True)
    for i in range(n):
        tiny.noise(i).save(path / f"p{i}.png")
    for name in BROKEN:
        (path / name).write_bytes(b"no picture")
    return path


def settings(tmp_path: Path) -> Settings:
    return Settings(str(tiny.checkpoint(tiny.VOCO)), str(tmp_path / "store"), max_new_tokens=2)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def test_every_picture_and_question_is_one_row_and_errors_are_a_column(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    report = run(str(source), ASKED, tmp_path / "out", settings(tmp_path), local.engine, batch_size=3)
    rows = rows_of(tmp_path / "out")
    expected = [(f"p{i}.png", question) for i in range(7) for question in ASKED.for_all]
    assert [(Path(row["path"]).name, row["question"]) for row in rows] == expected
    assert (report.rows, report.pictures, report.refused) == (14, 7, 2)
    for row in rows:
        is_broken = Path(row["path"]).name in BROKEN
        assert (row["error"] is not None) == is_broken == (row["answer"] is None) and row["id"]
        assert not is_broken or "is not a picture" in row["error"]
    with ImageStore.open(tmp_path / "store") as store:
        assert len(store) == 5 and store.find(rows[0]["path"]).hex() == rows[0]["id"]


def test_answers_are_those_of_each_picture_alone(tmp_path: Path) -> None:
    """Answers about another picture are the one thing that must not be."""
    from htc_vlm.model.answering import Answerer

    source = folder_of(tmp_path / "in")
    run(str(source), ASKED, tmp_path / "out", settings(tmp_path), local.engine, batch_size=4)
    answerer = Answerer(*tiny.loaded(tiny.VOCO))
    with ImageStore.open(tmp_path / "store") as store:
        for row in rows_of(tmp_path / "out"):
            if not row["error"]:
                alone = answerer.ask(store.get([row["id"]]), [0], [row["question"]], 2)[0]
                assert row["answer"] == alone
    assert any(row["answer"] for row in rows_of(tmp_path / "out"))


def _stops(batches: Sequence[Columns], given: Settings, after: int, hard: bool) -> Iterator[Columns]:
    for number, rows in enumerate(local.engine(batches, given)):
        if number == after:
            if hard:
                os._exit(9)  # as kill -9: nothing is cleaned up
            raise KeyboardInterrupt
        yield rows


def test_a_run_that_was_killed_twice_has_every_row_once(tmp_path: Path) -> None:
    """Rows lost, written twice, or pictures compressed again."""
    source, given = folder_of(tmp_path / "in"), settings(tmp_path)
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(str(source), ASKED, tmp_path / "out", given, functools.partial(_stops, after=1, hard=True), 2)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    with pytest.raises(KeyboardInterrupt):
        run(str(source), ASKED, tmp_path / "out", given, functools.partial(_stops, after=1, hard=False), 2)
    report = run(str(source), ASKED, tmp_path / "out", given, local.engine, 2)
    assert report.done_now == 3 + 1 and report.rows == 14  # p3.png is broken, and looked at again
    rows = rows_of(tmp_path / "out")
    assert len({(row["path"], row["question"]) for row in rows}) == len(rows) == 14
    again = run(str(source), ASKED, tmp_path / "out", given, local.engine, 2)
    assert again.done_now == len(BROKEN) and rows_of(tmp_path / "out") == rows


def test_pictures_in_the_store_are_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second round of questions costs no picture."""
    source, given = folder_of(tmp_path / "in"), settings(tmp_path)
    run(str(source), ASKED, tmp_path / "out", given, local.engine)
    seen: list[str] = []
    real = steps._picture
    monkeypatch.setattr(steps, "_picture", lambda content, name: seen.append(Path(name).name) or real(content, name))  # type: ignore[func-returns-value]
    run(str(source), Questions(["where is it ?"]), tmp_path / "more", given, local.engine)
    assert sorted(seen) == sorted(BROKEN) and len(rows_of(tmp_path / "more")) == 7


def test_rows_of_picture_and_question_are_asked_as_they_are(tmp_path: Path) -> None:
    """Named as in the source, below it, or by file name; a picture that is not there is a row with its error."""
    source = folder_of(tmp_path / "in")
    file = tmp_path / "rows.jsonl"
    pairs = [("p1.png", "what is it ?"), (str(source / "p2.png"), "how many ?"), ("p1.png", "where ?"), ("gone.png", "what ?")]
    file.write_text("".join(json.dumps({"picture": p, "question": q}) + "\n" for p, q in pairs))
    report = run(str(source), questions.read(file), tmp_path / "out", settings(tmp_path), local.engine)
    rows = rows_of(tmp_path / "out")
    asked = {(Path(row["path"]).name, row["question"]) for row in rows}
    assert asked == {(Path(p).name, q) for p, q in pairs} and len(rows) == 4 and report.refused == 1
    assert rows[-1]["error"] == "gone.png: is not among the pictures of the source"


def test_tars_parquet_and_lists_are_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes have the same id wherever they lie."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = folder_of(tmp_path / "in", 6)
    files = sorted(source.iterdir())
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
            text = tarfile.TarInfo(f"{file.stem}.json")
            tar.addfile(text, io.BytesIO(b""))
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = arrow.table({"image": images, "id": [file.name for file in files]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    (tmp_path / "list.txt").write_text("".join(f"in/{file.name}\n" for file in files))
    expected = [file.read_bytes() for file in files]
    for given in (tmp_path / "shard-*.tar", tmp_path / "x.parquet", tmp_path / "list.txt", tmp_path / "in"):
        refs = refs_of(str(given))
        assert [ref.read() for ref in refs] == expected and [Path(ref.name).name for ref in refs] == [f.name for f in files]
    parquet.write_table(arrow.table({"x": [1]}), tmp_path / "other.parquet")
    assert len(refs_of(str(tmp_path))) == 18  # pictures, tars and parquet files of a folder
    assert "other.parquet: has no column of pictures; columns are x" in capsys.readouterr().err
    run(str(tmp_path / "x.parquet"), ASKED, tmp_path / "out", settings(tmp_path), local.engine, kind="parquet")
    rows = parquet.read_table(tmp_path / "out" / "answers.parquet").to_pylist()
    assert len(rows) == 12 and sum(row["error"] is not None for row in rows) == 4
    assert len(refs_of(str(tmp_path))) == 18  # the answers are none
    with pytest.raises(ValueError, match="holds answers of htc-vlm batch, no pictures"):
        refs_of(str(tmp_path / "out" / "answers.parquet"))


def test_what_cannot_be_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, model = folder_of(tmp_path / "in"), str(tiny.checkpoint(tiny.VOCO))
    (tmp_path / "q.txt").write_text("what is it ?\n\nhow many ?\n")
    (tmp_path / "mixed.jsonl").write_text('{"question": "what ?"}\n{"picture": "a.png", "question": "what ?"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "what ?"}\n{oops\n')
    (tmp_path / "empty").mkdir()
    base = ["batch", str(source), "--store", str(tmp_path / "s"), "--output", str(tmp_path / "o"), "--model", model]
    asked = ["--questions", str(tmp_path / "q.txt")]
    assert main([*base, *asked, "--workers", "0", "--max-new-tokens", "1"]) == 1  # two broken pictures
    cases = {
        "was begun with other max_new_tokens; give another --output": [*base, *asked, "--max-new-tokens", "3"],
        "no such file of questions": [*base, "--questions", "nowhere.txt"],
        "mixed.jsonl: some rows name a picture and some do not": [*base, "--questions", str(tmp_path / "mixed.jsonl")],
        "bad.jsonl, line 2: is no JSON": [*base, "--questions", str(tmp_path / "bad.jsonl")],
        "--batch-size is 0": [*base, *asked, "--batch-size", "0"],
        "no pictures there": ["batch", str(tmp_path / "empty"), *base[2:], *asked],
        "nowhere: no such file or folder": ["batch", str(tmp_path / "nowhere"), *base[2:], *asked],
        "has no bottleneck": [*base[:-1], str(tiny.checkpoint(tiny.NONE)), *asked],
    }
    for message, words in cases.items():
        capsys.readouterr()
        assert main(words) == 2
        err = capsys.readouterr().err
        assert message in err and len([line for line in err.splitlines() if line.startswith("htc-vlm batch:")]) == 1


def test_rows_name_exactly_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name was asked about every picture of that name; a second spelling lost its questions."""
    monkeypatch.chdir(tmp_path)
    refs = [Ref(name, "file", name) for name in ("ph/a.png", "ph/b.png", "ph/x/a.png", "ph/x/c.png", "ph/y/c.png")]
    rows = {
        "a.png": ["1"], "b.png": ["2"], "ph/b.png": ["3", "2"], "./b.png": ["4"], str(tmp_path / "ph/x/a.png"): ["5"],
        "c.png": ["6"], "y/c.png": ["7"], "d.png": ["8"], "e.png": ["9"],
    }  # fmt: skip
    asked, strange = Questions(rows=rows).about(refs, Path("ph"), gone=["ph/e.png"])
    assert asked.pop("ph/b.png") == ["2", "3", "4"]
    assert asked == {"ph/a.png": ["1"], "ph/x/a.png": ["5"], "ph/y/c.png": ["7"], "ph/e.png": ["9"]}
    assert strange == {
        "c.png": "c.png: is the name of 2 pictures (ph/x/c.png, ph/y/c.png); give the path below the source",
        "d.png": "d.png: is not among the pictures of the source",
    }


def test_what_was_wrong_or_has_changed_is_asked_again(tmp_path: Path) -> None:
    """Errors were for ever, and another picture under the same path got the old one's answer."""
    source, output, given = folder_of(tmp_path / "in"), tmp_path / "out", settings(tmp_path)
    rows = Questions(rows={f"p{i}.png": ["what is it ?"] for i in (*range(5), 9)})
    assert run(str(source), rows, output, given, local.engine).refused == 2
    before = rows_of(output)
    tiny.noise(3).save(source / "p3.png")
    tiny.noise(9).save(source / "p9.png")
    tiny.noise(11).save(source / "p0.png")
    os.utime(source / "p1.png")
    (source / "p2.png").unlink()
    report = run(str(source), rows, output, given, local.engine)
    after = rows_of(output)
    assert (report.done_now, report.refused) == (3, 0) and not any(row["error"] for row in after)
    assert sorted(Path(row["path"]).name for row in after) == [f"p{i}.png" for i in (*range(5), 9)]
    ids = {Path(row["path"]).name: row["id"] for row in after}
    for name in ("p0.png", "p3.png", "p9.png"):
        assert ids[name] == hashlib.sha256((source / name).read_bytes()).hexdigest()
    assert [row for row in after if Path(row["path"]).name in ("p1.png", "p2.png")] == before[1:3]


def test_another_source_is_another_output(tmp_path: Path) -> None:
    """Rows of two sources were mixed."""
    source = folder_of(tmp_path / "in", 2)
    run(str(source), ASKED, tmp_path / "out", settings(tmp_path), local.engine)
    with pytest.raises(ValueError, match=r"was begun with other source \(it was .*/in\); give another --output"):
        run(str(folder_of(tmp_path / "other", 2)), ASKED, tmp_path / "out", settings(tmp_path), local.engine)


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_answers_of_somebody_else_are_not_replaced(tmp_path: Path, name: str) -> None:
    """An evaluation's answers, or the questions themselves, were gone."""
    source, output = folder_of(tmp_path / "in", 2), tmp_path / "out"
    output.mkdir()
    (output / name).write_text('{"question": "what ?"}\n')
    with pytest.raises(ValueError, match=f"{name}: already there, and of no batch run .*give another --output"):
        run(str(source), ASKED, output, settings(tmp_path), local.engine)
    assert [file.name for file in output.iterdir()] == [name] and (output / name).stat().st_size == 23


def test_one_run_at_a_time_writes_to_an_output(tmp_path: Path) -> None:
    """Two runs would interleave their rows."""
    with Journal(tmp_path / "o", {}), pytest.raises(ValueError, match="another batch run is writing here"):
        Journal(tmp_path / "o", {})
    with Journal(tmp_path / "o", {}):
        pass


def test_a_damaged_row_is_asked_again(tmp_path: Path) -> None:
    """SQLite gives flipped bytes without a word: another answer stood in the output. Rows of before checksums hold."""
    source, given, output = folder_of(tmp_path / "in"), settings(tmp_path), tmp_path / "out"
    run(str(source), ASKED, output, given, local.engine)
    expected = rows_of(output)
    changes = {
        0: "answer = 'not so'", 1: "path = 'q', number = 7", 2: "id = CAST(x'ff' AS TEXT)", 3: "error = 'x'", 4: "place = 9"
    }  # fmt: skip
    with sqlite3.connect(output / "answers.sqlite") as db:
        for place, change in changes.items():
            db.execute(f"UPDATE answers SET {change} WHERE place = {place} AND number = 1")
    db.close()
    assert run(str(source), ASKED, output, given, local.engine).done_now == len({*changes, *(int(name[1]) for name in BROKEN)})
    assert rows_of(output) == expected
    with sqlite3.connect(output / "answers.sqlite") as db:
        db.execute("ALTER TABLE answers DROP COLUMN checksum")
    db.close()
    assert run(str(source), ASKED, output, given, local.engine).done_now == len(BROKEN) and rows_of(output) == expected


def test_a_journal_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """SQLite's own errors ended in a traceback."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "answers.sqlite").write_bytes(b"no database " * 1000)
    with pytest.raises(ValueError, match=r"answers.sqlite: is damaged, or of no batch run .*move it and the answers"):
        Journal(tmp_path / "o", {})
    row = {"path": ["a"], "id": ["x" * 100_000], "number": [0], "question": ["q"], "answer": ["a"], "error": [""]}
    with Journal(tmp_path / "full", {}) as journal:
        journal._db.execute("PRAGMA max_page_count = 8")
        with pytest.raises(OSError, match="the disk is full; rows written before are kept"):
            journal.add(row, {"a": 0})
        assert journal.counts()["rows"] == 0


def test_questions_that_are_no_text_are_named(tmp_path: Path) -> None:
    """With the file and the row: a Latin-1 file, half a letter in JSON, a table that is none."""
    (tmp_path / "latin.txt").write_bytes("o\xf9 est le chat ?".encode("latin-1"))
    (tmp_path / "half.jsonl").write_text('{"question": "what ?"}\n{"question": "\\ud800 ?"}\n')
    (tmp_path / "long.csv").write_text("question\n" + "x" * 2000)
    wrong = {"latin.txt": "is not UTF-8", "half.jsonl": "row 2: .* no Unicode", "long.csv": "no table"}
    before = csv.field_size_limit(1000)  # one limit for the whole process, which other libraries raise
    try:
        for name, message in wrong.items():
            with pytest.raises(ValueError, match=f"{name}.*{message}"):
                read(tmp_path / name)
    finally:
        csv.field_size_limit(before)


def test_a_run_on_ray_leaves_the_actors_of_another_alone(tmp_path: Path) -> None:
    """The second run took over the stores that the first one's actors were writing, and removed them."""
    from htc_vlm.batch import on_ray

    given = settings(tmp_path)
    model, processor = tiny.loaded(tiny.VOCO)

    def keep(folder: Path, seed: int) -> None:
        with ImageStore.open(folder, model, processor) as store:
            store.add([tiny.noise(seed)])

    keep(Path(given.store), 0)
    workers = Path(f"{given.store}.workers")
    keep(workers / "ended" / "actor", 1)
    keep(workers / "of an earlier version", 2)
    with on_ray._run_folder(given) as busy:
        keep(busy / "actor", 3)
        assert on_ray.merge_workers(given) == 2
        assert list(workers.iterdir()) == [busy] and (busy / "actor" / "store.json").exists()
    assert on_ray.merge_workers(given) == 1 and not workers.exists()
    with ImageStore.open(given.store) as store:
        assert len(store) == 4


@pytest.mark.slow
def test_ray_gives_the_rows_of_the_local_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two actors, each with a store of its own, merged; a second run finds nothing to do. Ray is the real one."""
    ray = pytest.importorskip("ray")
    from htc_vlm.batch import on_ray

    monkeypatch.setenv("HTC_VLM_RAY_CPUS", "4")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers are nice to others, and would not end on a busy machine
    source = folder_of(tmp_path / "in", 24)
    run(str(source), ASKED, tmp_path / "local", settings(tmp_path / "a"), local.engine, 4)
    try:
        engine = functools.partial(on_ray.engine, n_actors=2)
        run(str(source), ASKED, tmp_path / "ray", settings(tmp_path / "b"), engine, 4)
        assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "local")
        with ImageStore.open(tmp_path / "a" / "store") as a, ImageStore.open(tmp_path / "b" / "store") as b:
            assert sorted(a.list()) == sorted(b.list()) and not Path(f"{b.path}.workers").exists()
            assert b.find(rows_of(tmp_path / "ray")[0]["path"])
        again = run(str(source), ASKED, tmp_path / "ray", settings(tmp_path / "b"), engine, 4)
        assert again.done_now == len(BROKEN)
        model, divprune = str(tinies.save_llava(tmp_path / "llava")), {"name": "divprune", "n_keep": 4}
        for name, one in (("c", local.engine), ("d", engine)):  # a model without a bottleneck
            stock = Settings(model, str(tmp_path / name / "store"), max_new_tokens=2, method=divprune)
            assert run(str(source), ASKED, tmp_path / name / "rows", stock, one, 4).rows == 48
        assert rows_of(tmp_path / "d" / "rows") == rows_of(tmp_path / "c" / "rows")
        ray.shutdown()
        monkeypatch.setenv("HTC_VLM_RAY_CPUS", "3")
        with pytest.raises(ValueError, match="Ray has 3 CPUs; with fewer than 4 it can wait for ever"):
            run(str(source), ASKED, tmp_path / "other", settings(tmp_path / "b"), engine, 4)
    finally:
        ray.shutdown()
