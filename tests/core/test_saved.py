"""Specs beside a checkpoint come back as they were, or it is said why not."""

import json

import pytest

import tokenprune
from tokenprune import SpecError, UnknownNameError, parse, parse_schedule, spec_of


@pytest.mark.parametrize(
    "stages",
    [
        ("vtc-cls(keep=64)",),
        ("cls-attention(layers=1) | evict(0.5)", "fastv | evict(0.5) @ after-layer(2)"),
        ("pyramiddrop",),
        (parse("tome(9)"),),
    ],
)
def test_what_was_saved_comes_back(tmp_path, stages):
    file = tokenprune.save_pretrained(tmp_path / "new", *stages)
    assert file == tmp_path / "new" / "tokenprune.json"
    expected = [
        stage
        for one in stages
        for stage in (parse_schedule(one) if isinstance(one, str) else (one,))
    ]
    assert list(tokenprune.from_pretrained(tmp_path / "new")) == expected


def test_recipes_are_written_out(tmp_path):
    file = tokenprune.save_pretrained(tmp_path, "vtc-cls")
    assert json.loads(file.read_text()) == {
        "format": 1,
        "tokenprune": tokenprune.__version__,
        "spec": spec_of(parse("vtc-cls")),
    }


def test_what_cannot_be_saved_is_refused(tmp_path):
    class Own(tokenprune.Scorer):
        def score(self, tokens, signals):
            raise NotImplementedError

    with pytest.raises(SpecError, match="nothing to save"):
        tokenprune.save_pretrained(tmp_path)
    own = tokenprune.Strategy(Own(), tokenprune.Evict(3)).at(tokenprune.BeforeLLM())
    with pytest.raises(SpecError, match="no name in a spec"):
        tokenprune.save_pretrained(tmp_path, own)
    for wrong in (own.strategy, tokenprune.Evict(3), tokenprune.BeforeLLM(), None):
        with pytest.raises(SpecError, match="a stage must be a spec or a Stage, got"):
            tokenprune.save_pretrained(tmp_path, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (None, SpecError, "there is no tokenprune.json in .*; save_pretrained writes one"),
        ("{", SpecError, 'must hold a JSON object with "format" and "spec"'),
        ("[]", SpecError, 'must hold a JSON object with "format" and "spec"'),
        ('{"format": 1}', SpecError, 'with "format" and "spec", a string; its spec is None'),
        ('{"format": 1, "spec": ["tome(9)"]}', SpecError, "a string; its spec is .'tome"),
        ('{"format": 2, "stages": []}', SpecError, "has format 2, this version reads 1"),
        ('{"format": 2, "spec": "tome(9)"}', SpecError, "has format 2, this version reads 1"),
        ('{"format": 1, "spec": "tome("}', SpecError, "cannot read"),
        ('{"format": 1, "spec": "gone(3)"}', UnknownNameError, "unknown strategy 'gone'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, error, words):
    if text is not None:
        (tmp_path / "tokenprune.json").write_text(text)
    with pytest.raises(error, match=words):
        tokenprune.from_pretrained(tmp_path)


def test_a_name_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SpecError, match="'nobody/nothing' is no folder, nor a checkpoint"):
        tokenprune.from_pretrained("nobody/nothing")
