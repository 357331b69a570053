"""Part files are whole or not there, and are joined into every row once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenprune.batch import ResumeError
from tokenprune.batch import part_files as parts_module
from tokenprune.batch.job import Job
from tokenprune.batch.part_files import finished, folder_of, opened

JOB = Job("model", "", "uniform | evict(3)", None, 64, "auto", "input", "/pictures", "1.0")


def table(*ids: str) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.string())})


def answers(*ids: str, answer: str = "yes") -> dict[str, list[object]]:
    same: dict[str, list[object]] = {
        name: [answer] * len(ids) for name in ("image", "prompt", "answer")
    }
    numbers: list[object] = [3] * len(ids)
    none: list[object] = [None] * len(ids)
    return {
        "id": list(ids),
        **same,
        "tokens_before": numbers,
        "tokens_after": numbers,
        "error": none,
    }


def ids(found: pa.Table) -> list[str]:
    return found.column("id").to_pylist()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.parquet"


@pytest.mark.parametrize("joined_at_once", [1, 2, 3, 100])
def test_parts_become_the_output_in_the_order_of_the_input(
    output: Path, joined_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "JOINED", joined_at_once)
    with opened(output, JOB, rows=2) as parts:
        assert ids(parts.pending(table("a", "b", "c"))) == ["a", "b", "c"]
        assert parts.add(answers("c")) == 1
        assert not list(parts.folder.glob("part-*"))
        assert parts.add(answers("a", answer="no")) == 1
        assert len(list(parts.folder.glob("part-*"))) == 1
        parts.add(answers("b"))
        parts.join(table("a", "b", "c"))
    joined = pq.read_table(output)
    assert ids(joined) == ["a", "b", "c"]
    assert joined.column("answer").to_pylist() == ["no", "yes", "yes"]
    strings = ("id", "image", "prompt", "answer", "error")  # the last although all are null
    assert {joined.schema.field(name).type for name in strings} == {pa.string()}
    assert finished(output, JOB)


def test_what_is_written_is_not_pending(output: Path) -> None:
    with opened(output, JOB, rows=1) as parts:
        parts.pending(table("a", "b"))
        parts.add(answers("b"))
    (folder_of(output) / "part-1.parquet.77.tmp").write_text("of a writer that was killed")
    with opened(output, JOB) as parts:
        assert not list(parts.folder.glob("*.tmp"))
        assert ids(parts.pending(table("a", "b"))) == ["a"]


def test_a_row_that_comes_twice_is_taken_once(output: Path) -> None:
    with opened(output, JOB, rows=1) as parts:
        parts.pending(table("a", "b"))
        assert parts.add(answers("a")) == 1
        assert parts.add(answers("a", "b", answer="no")) == 1
        assert parts.add(answers("b")) == 0
        parts.join(table("a", "b"))
    assert pq.read_table(output).column("answer").to_pylist() == ["yes", "no"]


def test_rows_without_an_answer_are_missed(output: Path) -> None:
    with opened(output, JOB) as parts:
        parts.pending(table("a", "b"))
        parts.add(answers("a"))
        with pytest.raises(ResumeError, match=r"1 rows came back without an answer, \['b'\]"):
            parts.join(table("a", "b"))
        assert not output.exists()
        assert ids(parts.pending(table("a", "b"))) == ["b"]  # and nothing is lost


def test_parts_of_other_work_are_refused(output: Path) -> None:
    with opened(output, JOB):
        pass
    other = replace(JOB, prune="uniform | evict(4)", model="large")
    said = (
        "holds parts of other work: model was 'model' and is 'large', prune was "
        "'uniform | evict(3)' and is 'uniform | evict(4)'; choose another --output"
    )
    with pytest.raises(ResumeError) as caught, opened(output, other):
        pass
    assert said in str(caught.value)


def test_parts_of_another_version_are_refused(output: Path) -> None:
    with opened(output, JOB):
        pass
    note = folder_of(output) / "job.json"
    note.write_text('{"model": "of a version that noted less"}')
    refused = pytest.raises(ResumeError, match="parts of another version of tokenprune; choose")
    with refused, opened(output, JOB):
        pass


def test_a_kill_while_the_output_is_written_leaves_nothing_beside_it(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with opened(output, JOB, rows=1) as parts:
        parts.pending(table("a"))
        parts.add(answers("a"))
    with monkeypatch.context() as here:
        here.setattr(Path, "replace", killed)
        with opened(output, JOB) as parts, pytest.raises(Killed):
            parts.join(table("a"))
    assert list(output.parent.iterdir()) == [folder_of(output)]
    assert list(folder_of(output).glob("*.tmp"))
    with opened(output, JOB) as parts:
        parts.join(table("a"))
    assert not list(folder_of(output).glob("*.tmp"))
    assert ids(pq.read_table(output)) == ["a"]


def test_an_output_of_other_work_is_refused(output: Path) -> None:
    assert not finished(output, JOB)
    with opened(output, JOB) as parts:
        parts.pending(table("a"))
        parts.add(answers("a"))
        parts.join(table("a"))
    with pytest.raises(
        ResumeError, match="max_new_tokens was 64 and is 1; choose another --output"
    ):
        finished(output, replace(JOB, max_new_tokens=1))
    pq.write_table(table("a"), output)
    with pytest.raises(ResumeError, match="this command did not write it"):
        finished(output, JOB)
    output.write_text("precious notes")
    with pytest.raises(ResumeError, match="this command did not write it"):
        finished(output, JOB)
    assert output.read_text() == "precious notes"


def test_two_writers_are_one_too_many(output: Path) -> None:
    pytest.importorskip("fcntl")
    refused = pytest.raises(ResumeError, match="another process is writing")
    with opened(output, JOB), refused, opened(output, JOB):
        pass
    with opened(output, JOB):
        pass


def test_a_job_is_read_as_it_was_written() -> None:
    assert Job.read(JOB.written) == JOB
    assert JOB.unlike(JOB) == ""
