"""lmms-eval: what can be tested without it. `make test-eval` runs the real command."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenprune
from tokenprune.errors import SpecError
from tokenprune.report import ImageReport, Report
from tokenprune_adapters import pocket
from tokenprune_adapters.lmms_eval.account import Account
from tokenprune_adapters.lmms_eval.exit_codes import EvaluationFailedError, fatal
from tokenprune_adapters.lmms_eval.mixin import Pruned
from tokenprune_adapters.lmms_eval.model_args import read_arguments, unquoted
from tokenprune_adapters.lmms_eval.pictures import decode_before

SPECS = [
    "vtc-cls(keep=128)",
    "cls-attention(layers=3, ensemble='max') | evict(0.25, per='crop') @ before-llm",
    "cls-attention(layers=(-4, -3)) | evict(64); fastv | evict(16) @ after-layer(2)",
    'cls-attention(ensemble="min") | evict(9) @ before-llm',
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", ["{}", '"{}"', "'{}'"])
def test_a_spec_comes_through_whole_quoted_or_not(spec: str, shape: str) -> None:
    if shape[0] in spec:
        pytest.skip("this quote stands in the spec")
    text = f"pretrained=a/b,prune={shape.format(spec)},dtype=float16"
    read = read_arguments(text)
    assert list(read) == ["pretrained", "prune", "dtype"]
    assert unquoted(read["prune"]) == spec


def test_as_a_shell_hands_it_on() -> None:
    line = (
        """lmms-eval --model_args pretrained=p,prune="uniform | evict(4, per='crop')" --tasks gqa"""
    )
    read = read_arguments(shlex.split(line)[2])
    assert read == {"pretrained": "p", "prune": "uniform | evict(4, per='crop')"}


def test_other_arguments_are_read_as_lmms_eval_reads_them() -> None:
    assert read_arguments("") == {}
    assert read_arguments(" a=1, b = x=y ,c=[1,2],d={'e': 1, \"f\": 2},") == {
        "a": "1",
        "b": "x=y",
        "c": "[1,2]",
        "d": "{'e': 1, \"f\": 2}",
    }
    assert read_arguments(r"t='it\'s, well',u=1") == {"t": r"'it\'s, well'", "u": "1"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pretrained=p,prune=evict(3", r"\) is missing in model_args .*; quote them"),
        ("pretrained=p,prune='evict(3)", "' is missing"),
        ("pretrained=p,evict(3)", r"cannot read 'evict\(3\)' in model_args .*name=value"),
        ("=3", "cannot read '=3'"),
        ("prune=a,prune=b", "'prune' stands twice"),
    ],
)
def test_arguments_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_arguments(text)


def answer_as_lmms_eval() -> str:
    try:
        with fatal("generate"):
            raise SpecError("the reason")
    except Exception:
        return ""


def test_an_exception_becomes_an_exit_that_no_except_clause_swallows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(EvaluationFailedError) as caught:
        answer_as_lmms_eval()
    assert caught.value.code == "tokenprune: generate failed: SpecError: the reason"
    assert isinstance(caught.value.__cause__, SpecError)
    assert "Traceback" in capsys.readouterr().err


class Loads:
    """In place of a class of lmms-eval; loading takes minutes there."""

    loaded = 0

    def __init__(self, **kwargs: Any) -> None:
        type(self).loaded += 1


class Model(Pruned, Loads):
    pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "prune must be a spec, got ''; e.g. --model_args 'pretrained="),
        ({"prune": 0.5}, "prune must be a spec, got 0.5"),
        ({"prune": "vtc-clz"}, "UnknownNameError: unknown strategy 'vtc-clz'"),
        ({"prune": "evict(0)"}, "evict"),
        ({"prune": "vtc-cls", "batch_size": "8"}, "Model answers one prompt at a time, as "),
        ({"prune": "vtc-cls", "batch_size": "auto"}, "got batch_size auto"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(EvaluationFailedError) as caught:
        Model(**arguments)
    assert words in str(caught.value.code)
    assert Loads.loaded == 0


def test_likelihoods_are_refused() -> None:
    with pytest.raises(EvaluationFailedError, match="of the type generate_until, got one that"):
        Model.__new__(Model).loglikelihood([])


def test_the_account_adds_up_prompts_and_leaves_out_those_without_pictures(tmp_path: Path) -> None:
    account = Account()
    assert account.means() == {}
    model, processor = pocket.load()
    asked = [pocket.draw(seed) for seed in range(3)]
    reports = []
    with tokenprune.attach(model, "vtc-cls(keep=9); uniform | evict(5) @ after-layer(1)") as pruned:
        for scene in asked:
            text = pocket.prompt(pocket.questions(scene)[0])
            inputs = processor(images=scene.picture, text=text, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=1)
            reports.append(pruned.report)
            account.add(reports[-1])
        text_only = processor(text="USER: is there a red one ? ASSISTANT:", return_tensors="pt")
        model.generate(**text_only, max_new_tokens=1)
        account.add(pruned.report)
    assert (account.prompts, account.images) == (4, 3)
    assert account.layers == {0: 27, 1: 15}
    assert account.kv_bytes == sum(report.kv_bytes for report in reports) > 0
    account.write(tmp_path / "new" / "report.json", {"spec": pruned.spec})
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written["spec"] == pruned.spec
    assert written["prompts"] == 4
    assert (written["tokens_before"], written["tokens_after"]) == (
        reports[-1].tokens_before,
        3 * 5,
    )
    assert written["tokens_by_layer"] == [
        {"from_layer": 0, "tokens": 27},
        {"from_layer": 1, "tokens": 15},
    ]
    assert written["per_image"]["visual_tokens_after"] == 5
    assert written["per_image"]["kv_bytes_vanilla"] == pytest.approx(account.kv_bytes_vanilla / 3)


def test_a_picture_of_which_nothing_is_reduced_ends_the_evaluation() -> None:
    harnessed, (model, processor) = Model.__new__(Model), pocket.load()
    harnessed._account = Account()
    scene = pocket.draw(0)
    text = pocket.prompt(pocket.questions(scene)[0])
    inputs = dict(processor(images=scene.picture, text=text, return_tensors="pt"))
    words = dict(processor(text="USER: is there a red one ? ASSISTANT:", return_tensors="pt"))
    with tokenprune.attach(model, "uniform | evict(3) @ after-layer(99)") as harnessed._attachment:

        def ask(given: dict[str, Any]) -> None:
            call = partial(model.generate, **given, max_new_tokens=1)
            harnessed._generating(call, {"inputs": None, **given})

        ask(words)
        with pytest.raises(EvaluationFailedError, match="' reduced nothing of a prompt"):
            ask(inputs)
    assert harnessed._account.prompts == 1


def test_several_pictures_in_one_prompt_count_each() -> None:
    account = Account()
    two = (ImageReport(64, 4), ImageReport(64, 4))
    account.add(Report(two, ((0, 8),), (), 1, 128, 8, 0.5, 80, 1280))
    assert account.images == 2
    assert account.means() == {
        "visual_tokens_before": 64,
        "visual_tokens_after": 4,
        "kv_bytes": 40,
        "kv_bytes_vanilla": 640,
        "selector_ms": 250,
    }


def asked(model: Any, processor: Any, keep: float, account: Account) -> None:
    scene = pocket.draw(0)
    text = pocket.prompt(pocket.questions(scene)[0])
    inputs = processor(images=scene.picture, text=text, return_tensors="pt")
    with tokenprune.attach(model, f"vtc-cls(keep={keep})") as pruned:
        model.generate(**inputs, max_new_tokens=1)
        account.add(pruned.report)


def test_prompts_that_keep_everything_count_with_the_cache_that_they_have() -> None:
    both, small, model = Account(), Account(), pocket.load()
    asked(*model, 1.0, both)
    assert both.means()["kv_bytes"] == both.means()["kv_bytes_vanilla"] == both.kv_bytes > 0
    whole = both.kv_bytes
    asked(*model, 9, small)
    assert small.kv_bytes < small.kv_bytes_vanilla == whole
    both.latest = Report()
    asked(*model, 9, both)
    assert both.means()["kv_bytes"] == (whole + small.kv_bytes) / 2
    assert both.means()["kv_bytes_vanilla"] == whole


def test_prompts_without_a_cache_do_not_count_as_empty_caches(tmp_path: Path) -> None:
    account = Account()
    account.add(Report((ImageReport(64, 4),), ((0, 4),), (), 1, 64, 4, 0.5, 80, 1280))
    account.add(Report((ImageReport(64, 4),), ((0, 4),), (), 2, 128, 8, 1.0, 0, 0))
    assert account.means()["kv_bytes"] == 80
    account = Account()
    account.add(Report((ImageReport(64, 4),), ((0, 4),), (), 1, 64, 4, 0.5))
    account.write(tmp_path / "report.json", {})
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["kv_bytes"] is written["kv_bytes_vanilla"] is None
    assert "kv_bytes" not in account.means()


def test_pictures_of_a_task_are_decoded_as_ours_are() -> None:
    """A processor alone would make 16-bit grey white."""
    _, processor = pocket.load()
    scene = pocket.draw(0).picture
    nothing = Image.new("RGBA", scene.size)
    page, wide = Image.new("RGB", scene.size, "white"), scene.convert("L").convert("I;16")
    wide = wide.point(lambda value: value * 257)
    for shown, wanted in ((nothing, page), (scene, scene), (wide, scene.convert("L"))):
        alone = processor.image_processor(wanted.convert("RGB"), return_tensors="pt")
        decoding = pocket.load()[1]
        decode_before(decoding.image_processor)
        for images in (shown, [shown], [[shown]]):
            seen = decoding(images=images, text="USER: <image> ASSISTANT:", return_tensors="pt")
            assert torch.equal(seen["pixel_values"], alone["pixel_values"])
    plain = processor.image_processor(wide.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert not torch.equal(plain, alone["pixel_values"])
