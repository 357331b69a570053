"""Draws the figure of the rooms: which parts of tokenprune may import which."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes

IMAGE = Path(__file__).parent / "images" / "rooms.png"
INK, FADED = "#1b2a41", "#5b6b80"
ROOMS = {  # name: (left, bottom, width, height, colour, what is in it)
    "tools": (
        0,
        7.4,
        10,
        1.6,
        "#e7f0fa",
        "cli   batch   bench   doctor   analysis   page   testing",
    ),
    "core": (0, 4.6, 10, 1.6, "#d8ead9", "strategies   plans   signals   specs   plugins   report"),
    "products": (0, 2.3, 4.7, 1.5, "#fbe9d0", "vllm/   lmms_eval/"),
    "models": (5.3, 2.3, 4.7, 1.5, "#fbe9d0", "hf/ (the wall)   open_clip/"),
    "kit": (0, 0, 7.2, 1.5, "#fdf3c7", "kit/   plain torch, for every adapter"),
    "pocket": (7.8, 0, 2.2, 1.5, "#f3e3f3", "pocket/"),
}
ARROWS = (  # from, to
    ((5, 7.4), (5, 6.25)),
    ((2.35, 3.8), (2.35, 4.55)),
    ((7.4, 3.8), (7.4, 4.55)),
    ((4.7, 3.05), (5.25, 3.05)),
    ((2.35, 2.3), (2.35, 1.55)),
    ((6.3, 2.3), (6.3, 1.55)),
)


def room(axes: Axes, name: str) -> None:
    """A box, its name, and what is in it."""
    left, bottom, width, height, colour, text = ROOMS[name]
    axes.add_patch(pyplot.Rectangle((left, bottom), width, height, facecolor=colour, edgecolor=INK))
    title = {"tools": "tools", "core": "core", "products": "servers, harnesses"}
    shown = title.get(name, {"models": "models", "pocket": "miniature"}.get(name, name))
    top = bottom + height - 0.25
    axes.text(left + 0.2, top, shown, va="top", color=INK, weight="bold", size=11)
    axes.text(left + 0.2, bottom + 0.3, text, va="bottom", color=INK, size=10)


def main() -> None:
    """Write the figure."""
    figure, axes = pyplot.subplots(figsize=(9, 7.2), dpi=110)
    axes.set(xlim=(-0.1, 13.4), ylim=(-0.3, 9.2))
    axes.axis("off")
    for name in ROOMS:
        room(axes, name)
    for start, end in ARROWS:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.4})
    door = {"arrowstyle": "-|>", "color": FADED, "lw": 1.4, "connectionstyle": "bar,fraction=-0.16"}
    axes.annotate("", (10.05, 0.75), (10, 8.2), arrowprops=door)
    axes.text(11.6, 5.6, "one door:\nshipped_adapters", color=FADED, size=10, va="center")
    axes.text(
        11.6,
        3.0,
        "core finds adapters\nas plugins, and\nimports none",
        color=FADED,
        size=10,
        va="center",
    )
    axes.set_title("Who imports whom", loc="left", color=INK, weight="bold")
    figure.savefig(IMAGE, bbox_inches="tight")


if __name__ == "__main__":
    main()
