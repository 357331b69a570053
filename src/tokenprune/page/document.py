"""Document: the whole HTML page of a folder."""

from __future__ import annotations

from pathlib import Path

from .bench_tables import bench_facts, bench_sections, explained
from .blocks import Section, facts
from .consistency_tables import consistency_section
from .markup import Html, join, tag
from .pictures import AGREEMENT, PLOTS, figure, figures, pictures_in
from .result_files import PageError, read_analysis, read_bench

STYLE = Path(__file__).with_name("style.css")

# Nothing may be loaded, whatever a name or spec smuggles in.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page_of(folder: Path) -> Html:
    """Everything found in `folder` as one HTML page that needs no other file.

    Args:
        folder: folder with any of `bench.json`, `analyze.json` and pictures.

    Raises:
        PageError: there is none of them, or one cannot be read.
    """
    if not folder.is_dir():
        raise PageError(f"there is no folder {folder}; give what tokenprune bench wrote into")
    found = pictures_in(folder)
    sections: list[Section] = []
    title, known, notes = "Visual-token compression", Html(""), Html("")
    if (folder / "bench.json").is_file():
        bench = read_bench(folder / "bench.json")
        title += f" of {bench.model}"
        known, notes = bench_facts(bench), join(explained(bench))
        accuracy, *rest = bench_sections(bench)
        plots = figures(found, PLOTS)
        sections += [
            Section(accuracy.anchor, accuracy.title, join([accuracy.content, plots])),
            *rest,
        ]
    if (folder / "analyze.json").is_file():
        result = read_analysis(folder / "analyze.json")
        sections.append(consistency_section(result, figures(found, AGREEMENT)))
        if not known:
            title += f" of {result.model}"
            known = facts(
                [
                    ("Model", result.model),
                    ("Data", str(result.data.get("name", ""))),
                    ("Device", f"{result.device}, {result.dtype}"),
                    *result.versions.items(),
                ]
            )
    if found:
        shown = join([figure(path) for path in found.values()])
        sections.append(Section("pictures", "Pictures", shown))
    if not sections:
        raise PageError(
            f"{folder} holds no bench.json, no analyze.json and no picture; write some with "
            f"tokenprune bench --out {folder}"
        )
    if notes:
        sections.append(Section("notes", "How to read this", notes))
    return _document(title, known, sections)


def write_page(folder: Path) -> Path:
    """Write `report.html` into `folder`, and say where it is."""
    page = page_of(folder)
    path = folder / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PageError(f"cannot write {path}: {error}") from error
    return path


def _document(title: str, known: Html, sections: list[Section]) -> Html:
    links = [tag("li", tag("a", one.title, href=f"#{one.anchor}")) for one in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    contents = tag("nav", tag("ul", *links), aria_label="Contents")
    header = tag("header", tag("h1", title), known, contents)
    main = tag("main", *(Html(section) for section in sections))
    body = tag("body", header, main, tag("footer", tag("p", "Made by tokenprune report.")))
    return Html(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")
