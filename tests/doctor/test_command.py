"""`tokenprune doctor`: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tokenprune.cli.app import app
from tokenprune.cli.doctor import verdict
from tokenprune.doctor import Comparison, Examination, Version, examine
from tokenprune.loading import LoadingError
from tokenprune.plugins import Registry
from tokenprune_adapters.hf.family_adapter import FamilyAdapter
from tokenprune_adapters.pocket import CHECKPOINT

LLAVA = "LlavaForConditionalGeneration (CLIP)"


def doctor(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", *words], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def fault(offering: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    def install(self: Any, *args: Any) -> Any:
        raise KeyError("hidden_states")

    offering()
    monkeypatch.setattr(FamilyAdapter, "install", install)


def test_text(offering: Callable[..., Registry]) -> None:
    offering()
    lines = [line.split() for line in doctor().output.splitlines()]
    assert ["library", "found", "tested"] in lines
    assert any(line[:1] == ["transformers"] and line[3] == "to" for line in lines)
    shown = [line for line in lines if line[:1] == ["LlavaForConditionalGeneration"]]
    assert [line[2:-2] for line in shown] == [
        ["before", "the", "LLM"],
        ["after", "layer", "2"],
        ["detached"],
    ]
    assert all(line[-2] == "ok" and float(line[-1]) < 1e-4 for line in shown)
    assert lines[-1][:6] == ["All", "3", "comparisons", "agree", "with", "vanilla"]


def test_a_fault_ends_with_one_and_says_what_to_do(fault: None) -> None:
    said = doctor(code=1).output
    assert f"{LLAVA}, before the LLM, and 1 more: KeyError: 'hidden_states'" in said
    assert said.splitlines()[-1].startswith(f"Do not use tokenprune with {LLAVA} here; ")
    assert "report it with the output of `tokenprune doctor --json`" in said.splitlines()[-1]


def test_json_of_a_fault_has_all_that_a_report_needs(fault: None) -> None:
    said = json.loads(doctor("--json", code=1).stdout)
    assert said["ok"] is False
    assert said["platform"]
    assert (said["device"], said["dtype"]) == ("cpu", "float32")
    assert {each["name"] for each in said["versions"]} >= {"python", "torch", "transformers"}
    before, inside, detached = said["comparisons"]
    assert before["model"] == LLAVA
    assert before["spec"].startswith("cls-attention(layers=3) | evict(")
    assert before["reason"] == "KeyError: 'hidden_states'"
    assert "test_command.py" in before["traceback"]
    assert inside["outcome"] == "failed"
    assert detached["outcome"] == "ok"
    assert 0 < detached["gap"] < 1e-4 < detached["tolerance"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checkpoint_of_ones_own(dtype: str) -> None:
    said = doctor("--model", str(CHECKPOINT), "--dtype", dtype).output
    assert f"LlavaForConditionalGeneration of {CHECKPOINT}, asked about random pictures" in said
    assert "cls-attention(layers=3) | evict(" in said
    assert "fastv | evict(" in said
    assert "All 3 comparisons agree" in said


def test_a_checkpoint_needs_no_processor(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(CHECKPOINT / name)
    said = json.loads(doctor("--json", "--model", str(tmp_path)).stdout)
    assert said["ok"] is True
    assert said["checkpoint"] == str(tmp_path)


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["doctor", "--model", "./nowhere"])
    assert "there is no folder ./nowhere" in str(result.exception)


@pytest.mark.parametrize("words", [[], ["--json"], ["--model", "pocket"]])
def test_a_device_that_is_not_there(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "nonsense", *words])
    assert "cannot use device 'nonsense'" in str(result.exception)
    assert isinstance(result.exception, LoadingError)


def test_a_checkpoint_on_which_the_adapter_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FamilyAdapter, "install", lambda self, *args: iter(()))
    said = doctor("--model", "pocket", code=1).output
    assert "Do not use tokenprune with LlavaForConditionalGeneration here" in said


def test_without_the_libraries_nothing_fails() -> None:
    code = (
        "import sys; sys.modules.update(transformers=None, open_clip=None)\n"
        "from tokenprune.cli import main; main(['doctor', '--json'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    outcomes = {each["model"]: each["outcome"] for each in json.loads(ran.stdout)["comparisons"]}
    assert outcomes[LLAVA] == outcomes["TimmModel of open_clip"] == "not installed"


def found(*outcomes: str, notes: str = "", **changes: Any) -> Examination:
    versions = (
        Version("transformers", "5.30.0", "5.19 to 5.24", notes, "transformers>=5.19,<5.25"),
    )
    made: Any = tuple(Comparison("M", "there", each, gap=1.0) for each in outcomes)  # type: ignore[arg-type]
    return replace(examine(only=()), versions=versions, comparisons=made, **changes)


NEWER = {"notes": "newer than tested"}
HALF = {"dtype": "bfloat16", "checkpoint": "here"}


@pytest.mark.parametrize(
    ("outcomes", "changes", "words"),
    [
        (["ok", "ok"], {}, "All 2 comparisons agree with vanilla runs by hand."),
        (
            ["ok", "ok", "not installed"],
            NEWER,
            "All 2 comparisons agree with vanilla runs by hand, on versions that were never tested "
            "(transformers 5.30.0), too.",
        ),
        (["ok"], {}, "The comparison agrees with vanilla runs by hand."),
        (["not installed"], {}, "Nothing was compared, because no library of a supported model is"),
        (
            ["failed", "unclear"],
            NEWER,
            "Do not use tokenprune with M here; install tested versions: pip install "
            "'transformers>=5.19,<5.25'; if it still fails, please report it with",
        ),
        (["failed"], {}, "Do not use tokenprune with M here; please report it with"),
        (["refused"], {}, "Do not use tokenprune with M here; please report it with"),
        (
            ["ok", "refused"],
            {"checkpoint": "here"},
            "What is refused cannot be done with this model; the reason is above.",
        ),
        (["unclear"], {"checkpoint": "here"}, "Nothing is shown: this model answers random"),
        (["unclear", "failed"], HALF, "In bfloat16 rounding may be the reason; compare with"),
    ],
)
def test_the_last_sentence(outcomes: list[str], changes: dict[str, str], words: str) -> None:
    assert verdict(found(*outcomes, **changes)).startswith(words)


def test_python_is_not_for_pip_to_install() -> None:
    made = found("failed", **NEWER)
    newer = Version("python", "3.15.1", "3.11 to 3.13", "newer than tested", "python>=3.11,<3.14")
    made = replace(made, versions=(newer, *made.versions))
    wanted = (
        "install tested versions: Python 3.11 to 3.13, pip install 'transformers>=5.19,<5.25'; "
    )
    assert wanted in verdict(made)
    alone = verdict(replace(made, versions=(newer,)))
    assert "install tested versions: Python 3.11 to 3.13; if it" in alone


def test_an_error_in_half_precision_is_no_rounding() -> None:
    made = found("failed", **HALF)
    made = replace(made, comparisons=(replace(made.comparisons[0], gap=None),))
    assert verdict(made).startswith("Do not use tokenprune with M here")
