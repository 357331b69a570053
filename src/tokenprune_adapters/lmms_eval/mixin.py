"""Mixin that adds compression to a model class of lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

import tokenprune
from tokenprune.errors import SpecError, UnsupportedError
from tokenprune.spec import parse_schedule

from ..kit.method_wrapper import wrap_method
from .account import Account
from .exit_codes import end_with_the_command, fatal
from .model_args import read_arguments, unquoted
from .pictures import decode_before


class Pruned:
    """Comes before a model class of lmms-eval that keeps a transformers model in `self.model`.

    Prompts, pictures and decoding remain that class's. The spec is one of `--model_args`, because
    these are the key of lmms-eval's cache of answers.
    """

    model: nn.Module
    _image_processor: Any = None
    task_dict: dict[str, Any]

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
        """As lmms-eval's, but specs may contain commas, and what goes wrong ends the process."""
        from lmms_eval.utils import handle_arg_string

        end_with_the_command()
        with fatal("reading --model_args"):
            given = read_arguments(arg_string)
            ours = {"prune", "report"} & given.keys()
            texts = {name: unquoted(given.pop(name)) for name in sorted(ours)}
            values = {name: handle_arg_string(value) for name, value in given.items()}
            more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**values, **texts, **more)

    def __init__(self, *args: Any, prune: str = "", report: str = "", **kwargs: Any) -> None:
        """Load the model as the class after this one does, and attach.

        Args:
            args: positional arguments of that class.
            prune: the spec, e.g. ``vtc-cls(keep=128)``; several stages with ";" between them.
            report: file to write the report to, as JSON; processes other than the first add their
                number to its name.
            kwargs: keyword arguments of that class.
        """
        with fatal(f"setting up prune={prune!r}"):
            stages = _stages(prune)  # before minutes of loading
            if str(kwargs.get("batch_size", 1)) != "1":
                raise UnsupportedError(
                    f"{type(self).__name__} answers one prompt at a time, as lmms-eval's own model "
                    f"does, got batch_size {kwargs['batch_size']}; leave it out, or use 1"
                )
            kwargs.setdefault("device_map", self._device_map(str(kwargs.get("device", "cuda"))))
            super().__init__(*args, **kwargs)
            image_processor = getattr(self._image_processor, "image_processor", None)
            if image_processor is not None:
                decode_before(image_processor)
            self._attachment = tokenprune.attach(self.model, *stages)
            self._guard = next(iter(wrap_method(self.model, "generate", self._generating)))
            self._account = Account()
            self._about = {
                "spec": self._attachment.spec,
                "pretrained": str(getattr(self, "pretrained", "")),
                "model": type(self.model).__name__,
                "versions": {
                    name: version(name) for name in ("tokenprune-vlm", "lmms-eval", "transformers")
                }
                | {"torch": version("torch")},
            }
            self._report = Path(report) if report else None
            self._write()

    def generate_until(self, requests: list[Any]) -> Any:
        """As the class after this one, but exceptions end the process; then the report is kept."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        with fatal("an evaluation"):
            answers = super().generate_until(requests)  # type: ignore[misc]
            self._write()
            # What lmms-eval adds up of this, it writes into its results, under "throughput".
            log_metrics(0.0, 0, 0.0, self._account.means())
        return answers

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Refused: lmms-eval counts the prompt's tokens there without those of the picture."""
        with fatal("a task of the type loglikelihood"):
            raise UnsupportedError(
                f"{type(self).__name__} answers tasks of the type generate_until, got one that "
                "compares likelihoods; most benchmarks have a variant that generates"
            )

    def clean(self) -> None:
        """Detach, so that nothing keeps the model alive, and free what the class after this did."""
        self._attachment.detach()
        self._guard.remove()
        super().clean()  # type: ignore[misc]

    @staticmethod
    def _device_map(device: str) -> str:
        """What the class after this one wants as its device_map, where nobody said."""
        raise NotImplementedError

    def _generating(self, call: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        with fatal("generate"):  # here, because lmms-eval's models make "" of exceptions
            output = call()
            before, report = self._account.latest, self._attachment.report
            if _pictures(arguments) and report.calls == before.calls:
                raise UnsupportedError(
                    f"{self._attachment.spec!r} reduced nothing of a prompt with pictures; does "
                    "this model have such layers?"
                )
            self._account.add(report)
        return output

    def _write(self) -> None:
        if self._report is None:
            return
        rank: int = getattr(self, "rank", 0)
        path = self._report
        self._account.write(path.with_stem(f"{path.stem}-{rank}") if rank else path, self._about)


def _stages(prune: object) -> tuple[tokenprune.Stage, ...]:
    if not (isinstance(prune, str) and prune.strip()):
        raise SpecError(
            f"prune must be a spec, got {prune!r}; e.g. --model_args "
            "'pretrained=llava-hf/llava-1.5-7b-hf,prune=vtc-cls(keep=128)'; for the model as it "
            "is, leave _tokenprune out of --model"
        )
    return parse_schedule(prune)


def _pictures(arguments: Mapping[str, Any]) -> bool:
    """Whether `generate` was given pictures or videos."""
    given = arguments.items()
    return any(name.startswith("pixel_values") and value is not None for name, value in given)
