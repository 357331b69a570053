"""A vLLM server of the shipped model as a process of its own, and the same in transformers."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import tokenprune
from tokenprune import Strategy, parse
from tokenprune_adapters import pocket
from tokenprune_adapters.vllm import ARCHITECTURE, KEY

PATIENCE = 900
"""Seconds within which a server must be up, on a busy machine."""

CLOSE = 1e-3
"""Most that log-probabilities may differ: float32 sums in another order."""


@dataclass(frozen=True)
class Question:
    """About one drawn picture, or several."""

    text: str
    scenes: tuple[int, ...]
    keep: float | None = None
    uuid: str | None = None

    def __str__(self) -> str:
        return f"{self.text!r} about {self.scenes} at {self.keep}"


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: one word.
        logprobs: of the most likely words.
        prompt: how many tokens the prompt had, those of the picture included.
    """

    text: str
    logprobs: dict[str, float]
    prompt: int


def questions(count: int, first: int = 0) -> list[Question]:
    """One question about each of `count` scenes, of types in turn."""
    found = []
    for seed in range(first, first + count):
        asked = pocket.questions(pocket.draw(seed))
        found.append(Question(asked[seed % len(asked)].text, (seed,)))
    return found


class RefusedError(Exception):
    """The server said no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Plain:
    """The model in transformers, one prompt at a time."""

    def __init__(self) -> None:
        self.model, self.processor = pocket.load()

    def ask(self, question: Question, spec: str) -> Answer:
        """What it says with the tokens that `spec` keeps, at the budget of `question`."""
        stage = parse(spec)
        if question.keep is not None:
            *before, reducer = stage.strategy.steps
            changed: Any = replace(reducer, keep=question.keep)  # type: ignore[type-var]
            stage = Strategy(*before, changed).at(stage.placement)
        marks = "<image> " * len(question.scenes)
        inputs = self.processor(
            images=[pocket.draw(seed).picture for seed in question.scenes],
            text=pocket.prompt(question.text).replace("<image> ", marks),
            return_tensors="pt",
        )
        with torch.no_grad(), tokenprune.attach(self.model, stage) as pruned:
            output = self.model(**inputs)
        kept = pruned.report.images
        logprobs = torch.log_softmax(output.logits[0, -1].float(), -1)
        words = [self.processor.decode([number]).strip() for number in range(len(logprobs))]
        assert len(set(words)) == len(words)
        return Answer(
            words[int(logprobs.argmax())],
            {word: float(value) for word, value in zip(words, logprobs, strict=True)},
            inputs["input_ids"].shape[1] - sum(image.before - image.after for image in kept),
        )


def check(said: Answer, expected: Answer, question: Question) -> None:
    """The same prompt length, the same log-probabilities, and so the same word."""
    assert said.prompt == expected.prompt, question
    assert said.logprobs, question
    for word, logprob in said.logprobs.items():
        assert abs(logprob - expected.logprobs[word]) < CLOSE, (question, word, said, expected.text)
    # Two words may be equally likely.
    best = expected.logprobs[expected.text]
    assert said.text == expected.text or best - expected.logprobs[said.text] < CLOSE, question


class Server:
    """`python -m vllm.entrypoints.openai.api_server` on a free port of this machine."""

    def __init__(
        self, checkpoint: Path, spec: str, options: list[str], log: Path, path: str = ""
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        overrides = {"architectures": [ARCHITECTURE], KEY: {"prune": spec}}
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(checkpoint), "--served-model-name", "pocket"),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--hf-overrides", json.dumps(overrides)),
            *options,
        ]
        self.url = f"http://127.0.0.1:{port}"
        self.spec = spec
        self.log = log
        self.path = path  # folders that Python searches beside its own
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """The process, without waiting for it."""
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self.path:
            known = env.get("PYTHONPATH")
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [self.path, known]))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=env, start_new_session=True
            )
        return self.process

    def __enter__(self) -> Server:
        process = self.start()
        until = time.monotonic() + PATIENCE
        try:
            while not self.is_up():
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-8000:]}")
                time.sleep(1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self.process is not None
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it has workers
        self.process.wait()

    def is_up(self) -> bool:
        """Whether it takes requests."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ask(self, question: Question, *, pictures: bool = True, **more: object) -> Answer:
        """Over the chat API, greedily, one word.

        Args:
            question: what to ask.
            pictures: whether to send them; without, the server must know them by their uuid.
            more: what else to put into `mm_processor_kwargs`.
        """
        sent: list[dict[str, Any]] = []
        for seed in question.scenes:
            url = {"url": _png(seed)} if pictures else None
            sent.append({"type": "image_url", "image_url": url})
            if question.uuid is not None:
                sent[-1]["uuid"] = question.uuid
        content = [*sent, {"type": "text", "text": question.text}]
        return self.chat(content, question.keep, more)

    def chat(
        self, content: object, keep: object = None, more: Mapping[str, object] | None = None
    ) -> Answer:
        """One message, and the first word that the model says.

        Args:
            content: of the message.
            keep: a budget, for `mm_processor_kwargs`.
            more: what else stands there.
        """
        options = {**(more or {}), **({} if keep is None else {KEY: {"keep": keep}})}
        body: dict[str, Any] = {
            "model": "pocket",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1,
            "add_special_tokens": True,  # the template leaves <s> to the tokenizer
            "logprobs": True,
            "top_logprobs": 5,
        }
        if options:
            body["mm_processor_kwargs"] = options
        said = self._post("/v1/chat/completions", body)
        (choice,) = said["choices"]
        (first,) = choice["logprobs"]["content"]
        return Answer(
            choice["message"]["content"].strip(),
            {top["token"].strip(): top["logprob"] for top in first["top_logprobs"]},
            said["usage"]["prompt_tokens"],
        )

    def metric(self, name: str) -> float:
        """The sum of a counter in the server's metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(map(float, found))

    def _post(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = json.loads(error.read())
            raise RefusedError(error.code, said["error"]["message"]) from None


def _png(seed: int) -> str:
    """A scene as a data URL; PNG loses nothing."""
    data = io.BytesIO()
    pocket.draw(seed).picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
