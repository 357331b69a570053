"""A run that was killed goes on where it was, without losing or doubling a row."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from support.batch import SPEC, DiesOnce, alone, answers_in, write_rows
from tokenprune.batch import Answerer, ResumeError, WorkerError
from tokenprune.batch.answerer import Columns
from tokenprune.batch.job import Job
from tokenprune.batch.part_files import folder_of
from tokenprune.batch.rows import read_rows
from tokenprune.batch.work import answer_all
from tokenprune.batch.workers import Here, Processes
from tokenprune.cli.app import app
from tokenprune_adapters import pocket

ROWS = 60


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows enough to be killed among them; the last picture is bad."""
    file = write_rows(tmp_path_factory.mktemp("many") / "rows", ROWS)
    with file.open("a") as lines:
        lines.write('{"id": "bad", "image": "none.png", "question": "what ?"}\n')
    return file


@pytest.fixture(scope="module")
def expected_of_many(many: Path) -> dict[str, str | None]:
    """What the compressed model answers, one prompt at a time."""
    return {**alone(many, rows=ROWS), "bad": None}


def command(rows: Path, output: Path, **options: object) -> list[str]:
    typed = {"model": pocket.CHECKPOINT, "input": rows, "output": output, "prune": SPEC}
    typed |= {"max-new-tokens": 1, "batch-size": 2, "save-every": 2} | options
    return ["batch", *(word for name, value in typed.items() for word in (f"--{name}", str(value)))]


def kill_amid(arguments: list[str], parts: Path) -> set[int]:
    """Start a command, kill it after some parts; returns its children's process ids."""
    run = [sys.executable, "-c", "from tokenprune.cli import main; main()", *arguments]
    with subprocess.Popen(run, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while len(list(parts.glob("part-*.parquet"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        found = (
            {int(child) for child in children.read_text().split()} if children.exists() else set()
        )
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Ids of the rows that this process answers."""
    seen: list[object] = []
    answer = Answerer.__call__

    def noted(self: Answerer, batch: Mapping[str, Iterable[object]]) -> Columns:
        seen.extend(batch["id"])
        return answer(self, batch)

    monkeypatch.setattr(Answerer, "__call__", noted)
    return seen


def test_killed_and_resumed(
    many: Path,
    expected_of_many: dict[str, str | None],
    tmp_path: Path,
    asked: list[object],
) -> None:
    output = tmp_path / "out.parquet"
    children = kill_amid(command(many, output, workers=2), folder_of(output))
    assert not output.exists()
    saved = [pq.read_table(part) for part in folder_of(output).glob("part-*.parquet")]
    done = {key for part in saved for key in part.column("id").to_pylist()}
    assert 6 <= len(done) < ROWS

    resumed = CliRunner().invoke(app, command(many, output), catch_exceptions=False)
    assert resumed.exit_code == 0, resumed.output
    assert f"answered       {ROWS} of {ROWS + 1} rows" in resumed.output
    assert "bad row        bad: cannot read a picture from none.png" in resumed.output
    assert set(asked) == {f"row-{n}" for n in range(ROWS)} - done | {"bad"}
    assert len(asked) == len(set(asked))

    assert not folder_of(output).exists()
    assert list(answers_in(output)) == [*(f"row-{number}" for number in range(ROWS)), "bad"]
    assert answers_in(output) == expected_of_many

    asked.clear()  # it is finished, so another run has nothing to do
    assert CliRunner().invoke(app, command(many, output), catch_exceptions=False).exit_code == 0
    assert not asked
    for child in children:
        gone(child)


def gone(process: int) -> None:
    """Wait until a process has ended: workers whose parent was killed must not stay."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state in "ZX":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {process} still runs")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prune": "uniform | evict(14)"}, "prune was 'cls-attention | evict(14) @ before-llm'"),
        ({"max-new-tokens": 2}, "max_new_tokens was 1 and is 2"),
        ({"model": "llava-hf/llava-1.5-7b-hf"}, "and is 'llava-hf/llava-1.5-7b-hf'"),
        ({"input": "{fewer}"}, "input was"),
    ],
)
def test_other_work_is_not_mixed_in(
    change: dict[str, object],
    words: str,
    rows_file: Path,
    tmp_path: Path,
    asked: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, fewer = tmp_path / "out.parquet", rows_file.with_name("fewer.jsonl")
    fewer.write_text(rows_file.read_text().splitlines()[0])
    changed = {name: str(value).format(fewer=fewer) for name, value in change.items()}
    with monkeypatch.context() as here:
        here.setattr(Here, "answers", interrupted)
        with pytest.raises(OSError, match="no space"):
            CliRunner().invoke(app, command(rows_file, output), catch_exceptions=False)
    assert len(list(folder_of(output).glob("part-*.parquet"))) == 1
    asked.clear()
    with pytest.raises(ResumeError) as caught:
        CliRunner().invoke(app, command(rows_file, output, **changed), catch_exceptions=False)
    assert "holds parts of other work" in str(caught.value)
    assert words in str(caught.value)
    assert not asked
    CliRunner().invoke(app, command(rows_file, output), catch_exceptions=False)
    assert len(asked) == 10  # of 12
    with pytest.raises(ResumeError, match="is there already, and holds other answers"):
        CliRunner().invoke(app, command(rows_file, output, **changed), catch_exceptions=False)


def interrupted(self, answerer, rows):
    """An engine that fails after one batch."""
    yield answerer(rows.slice(0, 2).to_pydict())
    raise OSError("no space")


def test_one_name_in_two_folders_is_two_pictures(tmp_path: Path, asked: list[object]) -> None:
    output = tmp_path / "out.parquet"
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        pocket.draw(0).picture.save(tmp_path / name / "0.png")
    typed = {"prompt": "how many objects are there ?"}
    CliRunner().invoke(app, command(tmp_path / "train", output, **typed), catch_exceptions=False)
    assert asked == ["0.png"]
    with pytest.raises(ResumeError, match="root was '.*train' and is '.*test'; choose another"):
        CliRunner().invoke(app, command(tmp_path / "test", output, **typed), catch_exceptions=False)


def test_no_file_is_open_in_the_folder_of_parts_when_it_is_removed(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network file system it could not be, and the command would fail when all is done."""
    held: list[str] = []
    remove = shutil.rmtree

    def noted(folder: Path, **options: object) -> None:
        held.extend(
            os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()
        )
        remove(folder, **options)

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are listed on Linux alone")
    monkeypatch.setattr(shutil, "rmtree", noted)
    output = tmp_path / "out.parquet"
    CliRunner().invoke(app, command(rows_file, output), catch_exceptions=False)
    assert held
    assert not [each for each in held if each.startswith(str(folder_of(output)))]
    assert not folder_of(output).exists()


def test_a_checkpoint_that_changed_is_another_one(rows_file: Path, tmp_path: Path) -> None:
    rows = read_rows(rows_file)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("before")
    before = Job.of(Answerer(str(folder)), rows)
    assert Job.of(Answerer(f"{folder}/../model"), rows) == before
    (folder / "model.safetensors").write_text("after it was trained further")
    assert "checkpoint was" in Job.of(Answerer(str(folder)), rows).unlike(before)


def test_what_a_worker_process_answered_outlives_it(
    many: Path, expected_of_many: dict[str, str | None], tmp_path: Path
) -> None:
    rows, output = read_rows(many), tmp_path / "out.parquet"
    settings = {"max_new_tokens": 1, "root": rows.root}
    mortal = DiesOnce(str(pocket.CHECKPOINT), SPEC, **settings)
    with pytest.raises(WorkerError, match="a worker process died .* run the same command again"):
        answer_all(mortal, rows, output, Processes(1, batch=4), save_every=1)
    assert Path(rows.root, "killed").read_text() != str(os.getpid())
    assert len(list(folder_of(output).glob("part-*.parquet"))) == 1
    seen: list[tuple[int, int]] = []
    answerer = Answerer(str(pocket.CHECKPOINT), SPEC, **settings)
    answer_all(answerer, rows, output, Here(), progress=lambda *counts: seen.append(counts))
    assert answers_in(output) == expected_of_many
    assert seen[0] == (4, 0)
    assert seen[-1] == (ROWS + 1, 1)
