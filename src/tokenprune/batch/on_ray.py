"""Answers computed by Ray Data, on one machine or a cluster."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .answerer import Answerer, Columns
from .errors import WorkerError

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

# Of a block whose actor died. Ray Data's own choice is "for ever", which with a picture that kills
# whoever opens it is just that.
RETRIES = 4
SPARE = 2  # logical CPUs of a new cluster beside the actors'


@dataclass(frozen=True)
class OnRay:
    """A model in each of several actors, by `map_batches`; one that dies is started anew.

    Attributes:
        address: address of the cluster; "auto" is the one that this machine belongs to, "local" a
            new one.
        workers: actors, or as many as the cluster has CPUs (or GPUs) for.
        batch: rows that a model answers at once.
        block: most rows of a task: what is answered again where an actor dies.
    """

    address: str
    workers: int
    batch: int = 8
    block: int = 256

    def answers(self, answerer: Answerer, rows: pa.Table) -> Iterator[Columns]:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise WorkerError(
                f"--ray needs Ray Data: pip install 'tokenprune-vlm[ray]' ({error})"
            ) from error
        mine = not ray.is_initialized()
        if mine:
            self._connect()
        try:
            # An actor takes a block at a time, so that all of them have some.
            share = math.ceil(len(rows) / (4 * self.workers * self.batch)) * self.batch
            size = max(self.batch, min(share, self.block))
            blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
            answered = self._map(ray.data.from_arrow(blocks), answerer)
            for block in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield block.to_pydict()
        except ray.exceptions.RayError as error:
            raise _plain(error) from error
        finally:
            if mine:
                ray.shutdown()

    def _map(self, rows: ray.data.Dataset, answerer: Answerer) -> ray.data.Dataset:
        import ray

        with warnings.catch_warnings():
            # It is to go in Ray 2.64, and nothing else limits how often a block is tried.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            return rows.map_batches(
                Answerer,
                fn_constructor_kwargs=answerer.settings,
                compute=ray.data.ActorPoolStrategy(size=self.workers),
                batch_size=self.batch,
                num_gpus=self._gpus(answerer.device),
                max_task_retries=RETRIES,
            )

    def _connect(self) -> None:
        import ray
        import ray.data

        cpus = None
        if self.address == "local":
            cpus = max(os.cpu_count() or 1, self.workers + SPARE)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # there is a bar already
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            ray.init(self.address, num_cpus=cpus, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # a start that takes too long raises just that
            first = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            doing, instead = f"reach Ray at {self.address!r}", ""
            if self.address == "local":
                doing = "start Ray on this machine"
                instead = "; try again, or take --workers without --ray"
            raise WorkerError(f"cannot {doing}: {first}{instead}") from error

    def _gpus(self, device: str) -> float | None:
        """GPUs of an actor; Ray shows it only those."""
        import ray

        wants = device == "cuda" or device == "auto"
        return 1 if wants and ray.cluster_resources().get("GPU", 0) else None


def _plain(error: Exception) -> WorkerError:
    """What was raised in a worker, in a line. Ray sends it as text, below a traceback."""
    first = str(error).partition("\n\nThe above exception was the direct cause")[0].strip()
    return WorkerError(f"work on Ray failed: {first.splitlines()[-1].strip()}")
