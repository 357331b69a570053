"""`Report` and `Record`: numbers, words, threads."""

from __future__ import annotations

import threading

import pytest
import torch

from tokenprune import (
    AttachError,
    Evict,
    ImageReport,
    Kept,
    Origin,
    RandomScorer,
    Record,
    Reduction,
    Report,
    ShapeError,
    Strategy,
    ToMe,
    VisualTokens,
)

CPU = torch.device("cpu")


def reduction(batch: int = 2, tokens: int = 8, keep: int = 3) -> Reduction:
    return Strategy(RandomScorer(), Evict(keep))(VisualTokens.of(torch.zeros(batch, tokens, 1)))


def test_nothing_has_happened_yet() -> None:
    record = Record()
    assert record.report == Report()
    assert str(record.report) == "no image has been reduced yet"
    with pytest.raises(AttachError, match="no image has been reduced yet: run the attached model"):
        record.last  # noqa: B018


def test_numbers_add_up() -> None:
    record = Record()
    first, second = reduction(), reduction(batch=1, tokens=5, keep=4)
    record.reduced(first, (8, 8))
    record.reduced(second, (5,))
    record.cached(stored=100, vanilla=400)
    report = record.report
    assert report.images == (ImageReport(before=5, after=4),)  # of the latest call
    assert (report.calls, report.tokens_before, report.tokens_after) == (2, 21, 10)
    assert (report.kv_bytes, report.kv_bytes_vanilla, report.kv_bytes_saved) == (100, 400, 300)
    assert record.last.plan is second.plan


def test_parts_of_one_call_are_joined() -> None:
    """Such as pictures and videos of one batch; what comes after is a call of its own again."""
    record = Record()
    first, second = reduction(), reduction(batch=1, tokens=5, keep=4)
    record.reduced(first, (8, 8))
    with record.same_call():
        record.reduced(second, (5,))
    report = record.report
    assert report.images == (ImageReport(8, 3), ImageReport(8, 3), ImageReport(5, 4))
    assert (report.calls, report.tokens_before, report.tokens_after) == (1, 21, 10)
    assert report.layers == ((0, 10),)
    assert record.last.plan.lengths == (3, 3, 4)
    with pytest.raises(ValueError, match="zip"), record.same_call():
        record.reduced(second, (5, 5))
    record.reduced(second, (5,))
    assert (record.report.calls, record.report.images) == (2, (ImageReport(5, 4),))


def positions(record: Record) -> list[list[int]]:
    tokens = record.last.tokens
    pairs = zip(tokens.patches.tolist(), tokens.mask.tolist(), strict=True)
    return [[n for n, real in zip(row, mask, strict=True) if real] for row, mask in pairs]


def test_kept_is_a_picture_for_each_row_where_nothing_is_said() -> None:
    """As an adapter does that knows of no crops, copies or videos."""
    record = Record()
    record.reduced(reduction(), (8, 8))
    first, second = positions(record)
    assert record.report.kept == (
        Kept("image", 0, (0, 0, 0), tuple(first)),
        Kept("image", 1, (0, 0, 0), tuple(second)),
    )
    assert record.last.origins == (Origin(0), Origin(1))


def test_pictures_come_before_videos_whatever_their_order_in_the_batch() -> None:
    record = Record()
    done = reduction(batch=3)
    origins = (Origin(0, "video", patches_per_crop=4), Origin(1), Origin(0))
    record.reduced(done, (8, 8, 8), origins)
    video, second, first = (tuple(row) for row in done.tokens.patches.tolist())
    assert record.report.kept == (
        Kept("image", 0, (0,) * 3, first),
        Kept("image", 1, (0,) * 3, second),
        Kept("video", 0, tuple(n // 4 for n in video), tuple(n % 4 for n in video)),
    )
    assert record.report.kept[2].frame == record.report.kept[2].crop
    assert positions(record) == [list(first), list(second), list(video)]
    assert record.last.origins == (Origin(0), Origin(1), Origin(0, "video", patches_per_crop=4))


def test_rows_that_are_crops_of_one_picture_are_one_entry() -> None:
    record = Record()
    done = reduction(batch=3)
    origins = (Origin(0), Origin(0, crop=1), Origin(1))
    record.decided(done, origins)
    record.counted((8, 8, 8), {0: (3, 3, 3), 2: (3, 1, 0)}, origins)
    assert record.report.images == (ImageReport(16, 4), ImageReport(8, 0))
    assert record.report.layers == ((0, 9), (2, 4))
    base, tile, other = (tuple(row) for row in done.tokens.patches.tolist())
    assert record.report.kept == (
        Kept("image", 0, (0, 0, 0, 1, 1, 1), base + tile),
        Kept("image", 1, (0, 0, 0), other),
    )
    assert record.report.kept[0].of(1) == tile
    assert [len(each) for each in record.report.kept] == [6, 3]


def test_copies_are_not_reported() -> None:
    record = Record()
    done = reduction(batch=4)
    origins = (Origin(0), None, Origin(1), None)
    record.decided(done, origins)
    record.counted((8,) * 4, {0: (3,) * 4}, origins)
    report = record.report
    assert (report.images, report.layers) == ((ImageReport(8, 3),) * 2, ((0, 6),))
    assert (report.tokens_before, report.tokens_after) == (16, 6)
    assert [list(each.patch) for each in report.kept] == done.tokens.patches[[0, 2]].tolist()
    assert torch.equal(record.last.plan.anchors, done.plan.anchors[[0, 2]])
    assert record.last.scores is not None
    assert done.scores is not None
    assert torch.equal(record.last.scores, done.scores[[0, 2]])


def test_parts_of_unequal_length_are_one_reduction() -> None:
    """A merging part and a selecting one, of 8 and 5 slots, with 3 and 4 kept tokens."""
    x = torch.arange(16.0).reshape(2, 8, 1)
    merged = Strategy(ToMe(3))(VisualTokens.of(x))
    chosen = reduction(batch=1, tokens=5, keep=4)
    record = Record()
    record.reduced(merged, (8, 8))
    with record.same_call():
        record.reduced(chosen, (5,), [Origin(0, "video")])
    last = record.last
    assert (last.plan.lengths, last.plan.tokens) == ((3, 3, 4), 8)
    assert last.scores is None  # ToMe has none
    assert last.patches is not None
    assert last.patches[2].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    whole = torch.cat([x, torch.tensor([[5.0, 6, 7, 8, 9, 0, 0, 0]])[:, :, None]])
    mixed = last.plan(whole)
    torch.testing.assert_close(mixed[:2, :3], merged.plan(x))
    assert mixed[2, :, 0].tolist() == [5.0 + n for n in chosen.plan.anchors[0].tolist()]
    assert last.plan.source()[2, :5].tolist() == chosen.plan.source()[0].tolist()


def test_parts_of_two_threads_do_not_mix() -> None:
    """Another thread's call comes between the pictures and the videos of this one's."""
    record = Record()
    record.reduced(reduction(batch=1), (8,))
    other = threading.Thread(target=lambda: record.reduced(reduction(batch=5), (8,) * 5))
    other.start()
    other.join()
    with record.same_call():
        record.reduced(reduction(batch=1, tokens=5), (5,), [Origin(0, "video")])
    report = record.report
    assert report.images == (ImageReport(8, 3), ImageReport(5, 3))
    assert [(each.kind, each.number) for each in report.kept] == [("image", 0), ("video", 0)]
    assert (report.calls, report.tokens_before) == (2, 8 + 40 + 5)


def test_origins_tell_of_every_row() -> None:
    with pytest.raises(ShapeError, match="origins must tell of each of 2 rows, got 1 origins"):
        Record().decided(reduction(batch=2), [Origin(0)])


def test_rows_and_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        Record().reduced(reduction(batch=2), (8,))


def test_an_earlier_report_does_not_change() -> None:
    record = Record()
    record.reduced(reduction(), (8, 8))
    earlier = record.report
    record.reduced(reduction(), (8, 8))
    assert earlier.calls == 1
    assert record.report.calls == 2


def test_time_is_taken_and_added_also_after_an_error() -> None:
    record = Record()
    with record.selecting(CPU):
        pass
    one = record.report.selector_seconds
    assert one > 0
    with pytest.raises(KeyError), record.selecting(CPU):
        raise KeyError
    assert record.report.selector_seconds > one


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        (0, "0 B of"),
        (1023, "1023 B of"),
        (1024, "1.0 KiB of"),
        (1536 * 1024, "1.5 MiB of"),
        (3 * 2**30, "3.0 GiB of"),
        (5000 * 2**30, "5000.0 GiB of"),
    ],
)
def test_bytes_are_readable(bytes_: int, words: str) -> None:
    report = Report(calls=1, kv_bytes=bytes_, kv_bytes_vanilla=bytes_ + 2**41)
    assert f"KV cache        {words}" in str(report)


def test_a_report_in_words() -> None:
    report = Report(
        images=(ImageReport(576, 128), ImageReport(576, 100)),
        calls=2,
        selector_seconds=0.003,
        kv_bytes=64 * 2**20,
        kv_bytes_vanilla=288 * 2**20,
    )
    assert str(report).splitlines() == [
        "visual tokens   576 -> 128, 576 -> 100",
        "selector time   1.50 ms per call (2 calls)",
        "KV cache        64.0 MiB of 288.0 MiB, 224.0 MiB saved",
    ]
    assert "KV cache" not in str(Report(calls=1))  # nothing was cached


def test_threads_may_share_a_record() -> None:
    record, done = Record(), reduction()
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(200):
            with record.selecting(CPU):
                pass
            record.reduced(done, (8, 8))
            record.cached(1, 2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = record.report
    assert (report.calls, report.tokens_before, report.tokens_after) == (800, 12800, 4800)


def test_a_call_that_fails_half_way_is_not_reported() -> None:
    """Neither what it decided nor that its bytes are not known; the next one is as ever."""
    record = Record()
    record.reduced(reduction(batch=1), (8,))
    record.cached(stored=100, vanilla=400)
    before, last = record.report, record.last
    record.decided(reduction(batch=3))
    assert record.report == before
    assert record.last.plan is last.plan
    record.decided(reduction(batch=2))
    record.cached(stored=10, vanilla=40)
    record.counted((8, 8), {0: (8, 8), 1: (3, 3)})
    report = record.report
    assert len(report.images) == len(report.kept) == len(record.last.plan.lengths) == 2
    assert (report.kv_bytes, report.kv_bytes_vanilla) == (10, 40)


def test_bytes_of_an_earlier_call_are_not_those_of_one_without_a_cache() -> None:
    record = Record()
    record.reduced(reduction(batch=1), (8,))
    record.cached(stored=100, vanilla=400)
    record.reduced(reduction(batch=1), (8,))
    assert record.report.kv_bytes == record.report.kv_bytes_vanilla == 0


def test_calls_of_two_threads_that_overlap_are_reported_whole() -> None:
    record = Record()
    record.decided(reduction(batch=1))

    def call() -> None:
        record.decided(reduction(batch=5))
        record.counted((8,) * 5, {0: (3,) * 5})
        record.cached(stored=5, vanilla=50)

    other = threading.Thread(target=call)
    other.start()
    other.join()
    assert len(record.report.kept) == len(record.report.images) == 5
    record.counted((8,), {0: (3,)})
    assert len(record.report.kept) == len(record.report.images) == 1
    assert record.report.kv_bytes == 0  # it has none yet
