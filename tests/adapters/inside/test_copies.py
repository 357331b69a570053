"""Which images of a batch are copies, on hand-made batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune import Origin
from tokenprune_adapters.hf.llm.copies import without_copies


def numbers(prompts: list[list[int]], times: dict[int, int]) -> list[int | None]:
    """Of each image its number in the report, None for copies; prompts are lists of prints."""
    prints = [each for prompt in prompts for each in prompt]
    rows = [row for row, prompt in enumerate(prompts) for _ in prompt]
    origins = [Origin(number) for number in range(len(prints))]
    found = without_copies(origins, prints, rows, len(prompts), times)
    return [None if origin is None else origin.number for origin in found]


@pytest.mark.parametrize(
    ("prompts", "times", "wanted"),
    [
        ([[7], [7]], {7: 1}, [0, None]),
        ([[7], [7]], {7: 2}, [0, 1]),
        ([[7], [7]], {}, [0, 1]),  # from elsewhere: nobody knows
        ([[7, 8], [7, 8], [8], [8]], {7: 1, 8: 2}, [0, 1, None, None, 2, None]),
        ([[7, 8, 7]] * 2 + [[7]] * 2, {7: 3, 8: 1}, [0, 1, 2, None, None, None, 3, None]),
        ([[7], [7], [], [], [8], [8]], {7: 1, 8: 1}, [0, None, 1, None]),
        ([[7], [8], [7], [8]], {7: 1, 8: 1}, [0, 1, None, None]),  # repeated in another way
        ([[7], [7], [8]], {7: 1, 8: 1}, [0, None, 1]),
        ([[8]], {7: 1, 8: 1}, [0]),  # not all that was encoded is shown
    ],
)
def test_what_is_a_copy(
    prompts: list[list[int]], times: dict[int, int], wanted: list[int | None]
) -> None:
    assert numbers(prompts, times) == wanted


def test_frames_of_a_copied_video_are_copies_together() -> None:
    """Numbers are counted anew for each kind, and frames of a video keep their own."""
    frames = [Origin(number, "video", crop) for number in (0, 1) for crop in (0, 1)]
    origins = [*frames[:2], Origin(0), *frames[2:], Origin(1)]
    found = without_copies(origins, [5, 5, 6, 5, 5, 6], [0, 0, 0, 1, 1, 1], 2, {5: 2, 6: 1})
    assert found == (*frames[:2], Origin(0), None, None, None)


@given(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4), st.integers(1, 4))
def test_expanding_prompts_never_changes_what_was_given(
    prompts: list[list[int]], size: int
) -> None:
    flat = [each for prompt in prompts for each in prompt]
    times = {each: flat.count(each) for each in flat}
    expanded = [prompt for prompt in prompts for _ in range(size)]
    first = [row % size == 0 for row, prompt in enumerate(expanded) for _ in prompt]
    found = numbers(expanded, times)
    assert [number for number, mine in zip(found, first, strict=True) if mine] == list(
        range(len(flat))
    )
    assert sum(number is not None for number in found) == len(flat)
