"""Workers that compute answers: this process, or several of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait as wait_for_any
from typing import TYPE_CHECKING, Protocol

import torch

from .answerer import Answerer, Columns
from .errors import WorkerError

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    import pyarrow as pa


class Engine(Protocol):
    """Engine that answers rows."""

    def answers(self, answerer: Answerer, rows: pa.Table) -> Iterator[Columns]:
        """Answers to all `rows`, some at a time, in any order."""


@dataclass(frozen=True)
class Here:
    """One model, in this process."""

    batch: int = 8

    def answers(self, answerer: Answerer, rows: pa.Table) -> Iterator[Columns]:
        yield from map(answerer, batches(rows, self.batch))


@dataclass(frozen=True)
class Processes:
    """A model in each of several processes; on a machine with GPUs they are spread over them."""

    workers: int
    batch: int = 8

    def answers(self, answerer: Answerer, rows: pa.Table) -> Iterator[Columns]:
        # A forked process could not use CUDA, and might inherit locks that are held.
        context = multiprocessing.get_context("spawn")
        devices = context.SimpleQueue()
        for device in _devices(answerer.device, self.workers):
            devices.put(device)
        running: set[Future[Columns]] = set()
        pool = ProcessPoolExecutor(self.workers, context, _begin, (answerer, devices, self.workers))
        try:
            for batch in batches(rows, self.batch):
                running.add(pool.submit(_answer, batch))
                if len(running) > 2 * self.workers:  # some wait, so that no worker does
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from _results(done)
            yield from _results(running)
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process died (killed, or out of memory?); what was answered is saved: "
                "run the same command again, perhaps with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def batches(rows: pa.Table, size: int) -> Iterator[Columns]:
    """`rows` as columns of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows.slice(start, size).to_pydict()


def _results(futures: Iterable[Future[Columns]]) -> Iterator[Columns]:
    """What came out, failures last, so that they cost nothing else."""
    for each in sorted(futures, key=lambda future: future.exception() is not None):
        yield each.result()


def _devices(device: str, workers: int) -> list[str]:
    """One for each worker."""
    count = torch.cuda.device_count()
    if device not in ("auto", "cuda") or not count:
        return [device] * workers
    return [f"cuda:{number % count}" for number in range(workers)]


_answerer: Answerer | None = None  # of a worker process, which does nothing else


def _begin(answerer: Answerer, devices: SimpleQueue[str], workers: int) -> None:
    global _answerer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and saves what is done
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    _answerer = replace(answerer, device=devices.get())


def _answer(batch: Columns) -> Columns:
    assert _answerer is not None
    return _answerer(batch)


def _die_with_parent() -> None:
    """A process that waits for work would outlive a parent that was killed, and hold its GPU."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_any([parent.sentinel])
    os._exit(1)
