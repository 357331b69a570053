"""The ways in which people load and call models of Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

import tokenprune
from support.llava import collate, generate, prompts, spec, tiny_llava
from support.oracle import greedy_batch
from tokenprune_adapters import pocket

STAGE = "vtc-cls(keep=14)"


def ask(model, processor, stage: str | None) -> list[str]:
    """One word for each question about a picture."""
    scene = pocket.draw(3)
    replies = []
    for question in pocket.questions(scene):
        text = pocket.prompt(question)
        inputs = processor(images=scene.picture, text=text, return_tensors="pt").to(model.device)
        if stage is None:
            output = model.generate(**inputs, max_new_tokens=1)
        else:
            with tokenprune.attach(model, stage):
                output = model.generate(**inputs, max_new_tokens=1)
        replies.append(processor.decode(output[0, -1]))
    return replies


@pytest.fixture(scope="module")
def wanted() -> list[str]:
    return ask(*pocket.load(), STAGE)


def test_the_pipeline(wanted: list[str]) -> None:
    pipe = pipeline("image-text-to-text", model=str(pocket.CHECKPOINT), dtype=torch.float32)
    scene = pocket.draw(3)
    said = []
    with tokenprune.attach(pipe.model, STAGE) as pruned:
        for question in pocket.questions(scene):
            content = [
                {"type": "image", "image": scene.picture},
                {"type": "text", "text": question.text},
            ]
            turns = [{"role": "user", "content": content}]
            out = pipe(text=turns, generate_kwargs={"max_new_tokens": 1}, return_full_text=False)
            said.append(out[0]["generated_text"].strip())
    assert said == wanted
    assert pruned.report.images == (tokenprune.ImageReport(64, 14),)


@pytest.mark.parametrize("where", ["auto", "disk"])
def test_device_maps(where: str, wanted: list[str], tmp_path: Path) -> None:
    """`auto`, and layers that lie on disk until they are needed."""
    accelerate = pytest.importorskip("accelerate")
    model = LlavaForConditionalGeneration.from_pretrained(
        pocket.CHECKPOINT, dtype=torch.float32, device_map="auto" if where == "auto" else None
    )
    if where == "disk":
        language = model.model.language_model
        places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"}
        places |= {"lm_head": "cpu", "model.language_model.norm": "cpu"}
        places |= {"model.language_model.embed_tokens": "cpu"}
        for number in range(len(language.layers)):
            places[f"model.language_model.layers.{number}"] = ("cpu", "disk")[number % 2]
        accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        )
        assert next(language.layers[1].parameters()).is_meta
    assert ask(model, AutoProcessor.from_pretrained(pocket.CHECKPOINT), STAGE) == wanted


@pytest.mark.filterwarnings("ignore")
def test_weights_in_int8_of_torchao() -> None:
    """The quantised model is compressed as its own kept embeddings say."""
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_llava()
    vanilla = generate(model, collate(prompts())).logits
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig(version=2))
    assert not torch.equal(generate(model, collate(prompts())).logits, vanilla)
    text, logits = greedy_batch(model, prompts(), 4)
    with tokenprune.attach(model, spec(4)):
        answer = generate(model, collate(prompts()))
    assert torch.equal(answer.text, text)
    torch.testing.assert_close(answer.logits, logits, atol=2e-3, rtol=1e-3)


def test_a_spec_beside_a_checkpoint(wanted: list[str], tmp_path: Path) -> None:
    model, processor = pocket.load()
    model.save_pretrained(tmp_path)
    tokenprune.save_pretrained(tmp_path, STAGE)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    (stage,) = tokenprune.from_pretrained(tmp_path)
    assert ask(again, processor, stage) == wanted
