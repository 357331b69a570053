"""The page of a folder, read by an HTML parser as a browser would."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tokenprune.bench.result import Bench, Row
from tokenprune.bench.scoring import Mean
from tokenprune.cli.app import app
from tokenprune.page import PageError, page_of, write_page
from tokenprune.page.result_files import read_bench

VOID = {"img", "meta", "br", "hr", "link"}
Fill = Callable[..., Path]


class Reader(HTMLParser):
    """Elements in order, tables as lists of rows; refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == "caption":
            self.caption = ""
        if name == "tr":
            self.tables[self.caption].append([])
        if name in ("td", "th"):
            self.tables[self.caption][-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name
        if name == "caption":
            assert self.caption not in self.tables
            self.tables[self.caption] = []

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "caption" in self.open:
            self.caption += data
        if {"td", "th"} & set(self.open):
            self.tables[self.caption][-1][-1] += data

    def table(self, start: str) -> list[list[str]]:
        (found,) = (rows for caption, rows in self.tables.items() if caption.startswith(start))
        return found

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture
def page(filled: Fill, bench: dict[str, Any], analysis: dict[str, Any]) -> Reader:
    folder = filled(
        bench=bench,
        analyze=analysis,
        accuracy="",
        consistency="",
        kept="vtc-cls keeps 14 of 64",
    )
    return Reader(page_of(folder))


def test_accuracy_by_budget(page: Reader) -> None:
    assert page.table("Accuracy in %, ±") == [
        ["method", "all 64 tokens", "25.0 %, 16 tokens", "12.5 %"],
        ["vanilla", "93.0 ± 1.2", "", ""],
        ["blind control", "30.0 ± 1.2", "", ""],
        ["vtc-cls", "", "80.0 ± 1.2✓", ""],
        ["tome", "", "60.0 ± 1.2✗", ""],
        ["random floor", "", "61.0 ± 1.2", "50.0 ± 1.2"],
        ["pool floor", "", "64.0 ± 1.2", ""],
        ["inside", "", "", "71.0 ± 1.2"],
    ]


def test_the_best_method_stands_beside_the_best_floor(page: Reader) -> None:
    assert page.table("The best method") == [
        ["kept", "placement", "best method, %", "best floor, %", "beats every floor"],
        ["25.0 %, 16 tokens", "before-llm", "vtc-cls: 80.0 ± 1.2", "pool: 64.0 ± 1.2", "yes"],
        ["12.5 %", "before-llm", "inside: 71.0 ± 1.2", "random: 50.0 ± 1.2", "–"],
    ]
    assert "all 64 tokens: 93.0 ± 1.2 %" in page.text


def test_floors_stand_beside_methods_of_their_placement(
    filled: Fill, bench: dict[str, Any]
) -> None:
    for one in (bench["rows"][2], bench["rows"][4]):  # vtc-cls and random
        one["spec"] = f"{one['label']} | evict(0.25) @ after-layer(2); x @ before-llm"
    page = Reader(page_of(filled(bench=bench)))
    assert page.table("The best method")[1:3] == [
        ["25.0 %, 16 tokens", "after-layer(2)", "vtc-cls: 80.0 ± 1.2", "random: 61.0 ± 1.2", "yes"],
        ["25.0 %, 16 tokens", "before-llm", "tome: 60.0 ± 1.2", "pool: 64.0 ± 1.2", "no"],
    ]


def test_types_of_question(page: Reader) -> None:
    table = page.table("Accuracy in % by type")
    assert table[0] == ["method", "kept", "colour (40)", "existence (80)", "F1 of existence"]
    assert table[3] == ["vtc-cls", "16 of 64", "85.0 ± 2.0", "75.0", "79.0"]
    assert len(table) == 1 + 8


def test_every_spec_and_budget(page: Reader) -> None:
    table = page.table("Exact specs")
    assert table[1] == ["vanilla", "64 of 64", "93.0 ± 1.2", "87.5 ± 3.2", "nothing attached"]
    spec = "tome | evict(0.25) @ before-llm"
    assert table[4] == ["tome", "16 of 64", "60.0 ± 1.2✗", "87.5", spec]
    assert len(table) == 1 + 8
    costs = page.table("Costs")
    assert costs[3] == ["vtc-cls", "16", "24.0 KiB (25 %)", "0.568", "12.3", "234"]
    assert costs[7][1:3] == ["64, 8.5 from layer 2", "–"]
    assert costs[1][3] == "–"


def test_agreement_with_the_llm(page: Reader) -> None:
    table = page.table("Scores against what the output")
    assert table == [
        ["scores", "overlap at 14, %", "rank correlation"],
        ["cls-attention", "45.6 ± 1.0", "+0.321 ± 0.010"],
        ["random", "22.0 ± 1.0", "-0.004 ± 0.010"],
    ]
    layers = page.table("Rank correlation with what the output")
    assert layers[:2] == [["scores", "1", "2"], ["cls-attention", "+0.32", "+0.42"]]
    assert not any("last token" in caption for caption in page.tables)


def test_what_is_said_is_where_it_came_from(page: Reader) -> None:
    for words in ("Pocket-VQA", "1,200", "cpu, float32, batch 50", "2.6", "5.4"):
        assert words in page.text


def test_pictures_are_inside_and_have_words(page: Reader) -> None:
    pictures = page.all("img")
    assert len(pictures) == 3
    for picture in pictures:
        kind, _, data = str(picture["src"]).partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (30, 20)
        assert (picture["width"], picture["height"]) == ("30", "20")
    assert [p["alt"] for p in pictures] == [
        "Accuracy against visual tokens kept; bars are one standard error.",
        "Overlap and rank correlation of scores with the attention of each LLM layer.",
        "vtc-cls keeps 14 of 64",
    ]


def test_pictures_that_differ_by_their_ending_are_all_shown(tmp_path: Path) -> None:
    for name, colour in (("kept.png", "red"), ("kept.jpg", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    text = Reader(page_of(tmp_path)).text
    assert "kept.png" in text
    assert "kept.jpg" in text


def test_nothing_is_loaded_from_elsewhere(filled: Fill, bench: dict[str, Any]) -> None:
    text = page_of(filled(bench=bench, kept="words"))
    page = Reader(text)
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "base", "form")
        for key in ("src", "href", "srcset", "action", "data", "poster", "background"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/"))
        assert not any(key.startswith("on") for key in attributes)
    assert not re.search(r"url\(|@import|https?:", text)
    policy = next(a for a in page.all("meta") if a.get("http-equiv"))
    assert str(policy["content"]).startswith("default-src 'none'")


def test_links_and_labels_lead_somewhere(page: Reader) -> None:
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    assert {str(link["href"])[1:] for link in page.all("a")} <= set(names)
    assert {section["aria-labelledby"] for section in page.all("section")} <= set(names)
    levels = [name for name, _ in page.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == "h1"
    assert levels.count("h1") == 1


def test_hostile_words_are_words(
    filled: Fill, bench: dict[str, Any], analysis: dict[str, Any], hostile: str
) -> None:
    clean = Reader(page_of(filled(bench=bench, analyze=analysis, kept="words")))
    for row in bench["rows"]:
        row["label"] += hostile
        row["spec"] = hostile
        row["types"] = {name + hostile: one for name, one in row["types"].items()}
    bench |= {"model": hostile, "device": hostile, "dtype": hostile, "versions": {hostile: hostile}}
    bench["data"]["name"] = hostile
    analysis["scorers"] = [name + hostile for name in analysis["scorers"]]
    for one in analysis["curves"]:
        one["scorer"] += hostile
    page = Reader(page_of(filled(bench=bench, analyze=analysis, kept=hostile)))
    assert not page.all("script")
    assert len(page.all("img")) == 1
    assert page.all("img")[0]["alt"] == hostile
    assert page.table("Exact specs")[2][-1] == hostile
    assert page.text.count(hostile) > 50
    kinds = {name for name, _ in clean.elements}
    assert {name for name, _ in page.elements} <= kinds


def test_a_page_of_parts(filled: Fill, analysis: dict[str, Any], tmp_path: Path) -> None:
    """An analysis alone; then one picture alone."""
    page = Reader(page_of(filled(analyze=analysis)))
    assert "Visual-token compression of pocket" in page.text
    (tmp_path / "analyze.json").unlink()
    page = Reader(page_of(filled(kept="words")))
    assert page.tables == {}
    assert len(page.all("img")) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read .*bench.json"),
        ("[]", "has format None, this version reads 1"),
        ('{"format": 7}', "has format 7, this version reads 1"),
        ('{"format": 1}', "rows"),
        ('{"format": 1, "rows": []}', "no rows"),
        ('{"format": 1, "rows": [{"label": "x"}]}', "types"),
        ('{"format": 1, "rows": [{"types": {}, "tokens": 3}]}', "not iterable"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(PageError, match=words):
        page_of(tmp_path)


def test_a_field_that_is_missing_is_named(filled: Fill, bench: dict[str, Any]) -> None:
    del bench["rows"][1]["label"], bench["rows"][1]["f1"]
    with pytest.raises(PageError, match="row without label, f1"):
        page_of(filled(bench=bench))


def test_fields_of_later_versions_do_not_matter(filled: Fill, bench: dict[str, Any]) -> None:
    bench["rows"][2]["moon"] = "full"
    bench["later"] = []
    assert Reader(page_of(filled(bench=bench))).tables


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(PageError, match="holds no bench.json, no analyze.json and no picture"):
        page_of(tmp_path)
    with pytest.raises(PageError, match="there is no folder"):
        page_of(tmp_path / "none")


def test_the_command_writes_it(filled: Fill, bench: dict[str, Any]) -> None:
    folder = filled(bench=bench)
    result = CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert str(folder / "report.html") in result.output
    assert (folder / "report.html").read_text(encoding="utf-8") == page_of(folder)
    assert write_page(folder) == folder / "report.html"  # its own output does not disturb it


def test_the_reader_refuses_tags_that_do_not_match() -> None:
    for wrong in ("<p><b>x</p>", "<p>", "</p>"):
        with pytest.raises((AssertionError, IndexError)):
            Reader(wrong)


def test_what_a_bench_writes_is_read_again(tmp_path: Path) -> None:
    mean = Mean(0.5, math.nan, 3)
    numbers = dict.fromkeys(["kv_bytes", "kv_bytes_vanilla", "f1", "beats_floors"], None)
    row = Row(
        *("vanilla", None, "vanilla", 1.0, 0.5, 0.1, {"colour": mean}),
        **numbers,
        **dict.fromkeys(["agreement", "agreement_error"], 0.25),
        **dict.fromkeys(["selector_ms", "first_token_ms", "total_ms"], 2.5),
        tokens=((0, 64.0), (2, 8.5)),
    )
    data = {"name": "", "questions": 3, "pictures": 1}
    bench = Bench("pocket", data, "cpu", "float32", 5, {"torch": "2"}, (row,), ())
    bench.write(tmp_path)
    again = read_bench(tmp_path / "bench.json")
    assert math.isnan(again.rows[0].types["colour"].error)
    # NaN is not equal to itself, so compare what is written of both.
    again.write(tmp_path / "again")
    written = [(folder / "bench.json").read_text() for folder in (tmp_path, tmp_path / "again")]
    assert written[0] == written[1]
