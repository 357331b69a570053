"""`Report` and `Record`: numbers, words, threads."""

from __future__ import annotations

import threading

import pytest
import torch

from tokenprune import (
    AttachError,
    Evict,
    ImageReport,
    RandomScorer,
    Record,
    Reduction,
    Report,
    Strategy,
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
    assert record.last is second


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
    with pytest.raises(ValueError, match="zip"), record.same_call():
        record.reduced(second, (5, 5))
    record.reduced(second, (5,))
    assert (record.report.calls, record.report.images) == (2, (ImageReport(5, 4),))


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
