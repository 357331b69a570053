"""Batch work on a real Ray: what comes out is what one process answers, also when a worker dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray

from support.batch import SPEC, answers_in, columns
from tokenprune.batch import Answerer, WorkerError, on_ray
from tokenprune.batch.on_ray import OnRay
from tokenprune.batch.rows import read_rows
from tokenprune.batch.work import answer_all
from tokenprune.cli import main
from tokenprune_adapters import pocket

from .conftest import ROWS

MODEL = str(pocket.CHECKPOINT)
NOTHING = {name: [None] for name in ("answer", "tokens_before", "tokens_after", "error")}


@pytest.mark.usefixtures("cluster")
def test_map_batches_as_documented(rows_file: Path, expected: dict[str, str | None]) -> None:
    """The callable alone, with pictures as pixels that Ray read, in two actors."""
    prompts = dict(zip(columns(rows_file)["image"], columns(rows_file)["prompt"], strict=True))
    pictures = ray.data.read_images(str(rows_file.parent), include_paths=True, mode="RGB")
    asked = pictures.map(
        lambda row: (
            {"image": row["image"], "prompt": prompts[Path(row["path"]).name]}
            | {"name": Path(row["path"]).name}
        )
    )
    answered = asked.map_batches(
        Answerer,
        fn_constructor_kwargs={"model": MODEL, "prune": SPEC, "max_new_tokens": 1},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=4,
    ).take_all()
    wanted = {f"{number}.png": expected[f"row-{2 * number + 1}"] for number in range(ROWS // 2)}
    assert {row["name"]: row["answer"] for row in answered} == wanted
    assert len(answered) == ROWS // 2
    assert {row["tokens_after"] for row in answered} == {14}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("batch", [2, 5])
def test_a_worker_killed_mid_run(
    batch: int,
    rows_file: Path,
    expected: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every row once, and with the answer of one process."""

    class DiesOnce(Answerer):  # local, so that Ray sends it along
        def __call__(self, batch):
            answers = super().__call__(batch)
            note = Path(self.root, f"{os.getpid()}.worker")
            killed = Path(self.root, "killed")
            if note.exists() and not killed.exists():
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            note.write_text(note.read_text() + "." if note.exists() else ".")
            return answers

    monkeypatch.setattr(on_ray, "Answerer", DiesOnce)
    (rows_file.parent / "3.png").write_text("no picture")
    rows, output = read_rows(rows_file), tmp_path / "out.parquet"
    answerer = Answerer(MODEL, SPEC, max_new_tokens=1, root=rows.root)
    seen: list[tuple[int, int]] = []
    answer_all(
        answerer,
        rows,
        output,
        OnRay("local", workers=2, batch=batch),
        save_every=4,
        progress=lambda *counts: seen.append(counts),
    )
    killed = int((rows_file.parent / "killed").read_text())
    workers = {int(note.stem) for note in rows_file.parent.glob("*.worker")}
    assert killed in workers
    assert killed != os.getpid()
    assert len(workers) == 3  # two, and one in place of the dead
    assert answers_in(output) == expected | {"row-6": None, "row-7": None}
    assert list(answers_in(output)) == [f"row-{number}" for number in range(ROWS)]
    assert seen[-1] == (ROWS, 2)


@pytest.mark.usefixtures("cluster")
def test_what_is_wrong_with_all_rows_is_said_in_a_line(rows_file: Path, tmp_path: Path) -> None:
    rows, output = read_rows(rows_file), tmp_path / "out.parquet"
    cannot = Answerer(MODEL, "pool-attention | evict(3)", root=rows.root)
    with pytest.raises(WorkerError) as caught:
        answer_all(cannot, rows, output, OnRay("local", workers=2))
    words = "UnsupportedError: LlavaForConditionalGeneration cannot supply PoolAttention"
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cluster")
def test_a_picture_that_kills_whoever_opens_it_does_not_go_on_for_ever(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(Answerer):
        def __call__(self, batch):
            if "7.png" in batch["image"]:
                with Path(self.root, "deaths").open("a") as deaths:
                    deaths.write(".")
                os.kill(os.getpid(), signal.SIGKILL)
            return {name: list(column) for name, column in batch.items()} | NOTHING

    monkeypatch.setattr(on_ray, "Answerer", Dies)
    rows, output = read_rows(rows_file), tmp_path / "out.parquet"
    answerer = Answerer(MODEL, SPEC, root=rows.root)
    with pytest.raises(WorkerError, match="work on Ray failed"):
        answer_all(answerer, rows, output, OnRay("local", 2, batch=1, block=1), save_every=1)
    assert 1 < len((rows_file.parent / "deaths").read_text()) < 20
    assert list(tmp_path.glob("out.parquet.parts/part-*"))  # others were saved
    assert not output.exists()


def test_the_command_with_a_cluster_of_its_own(
    rows_file: Path, expected: dict[str, str | None], tmp_path: Path
) -> None:
    ray.shutdown()
    output = tmp_path / "out.parquet"
    typed = {"model": MODEL, "input": rows_file, "output": output, "prune": SPEC, "ray": "local"}
    typed |= {"max-new-tokens": 1, "batch-size": 4, "workers": 2}
    with pytest.raises(SystemExit) as stop:
        main(["batch", *(word for n, value in typed.items() for word in (f"--{n}", str(value)))])
    assert not stop.value.code
    assert not ray.is_initialized()
    assert answers_in(output) == expected
