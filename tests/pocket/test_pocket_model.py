from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tokenprune.bench import bench
from tokenprune.bench import pocket as pocket_vqa
from tokenprune_adapters import pocket
from train_pocket.language import LanguageLessons
from train_pocket.model import build, build_processor, save
from train_pocket.tower import pixels


def answers(model, processor, pictures, asked, batch: int = 60) -> list[str]:
    """One word for each pair of a picture and a question."""
    replies: list[str] = []
    for start in range(0, len(asked), batch):
        part = slice(start, start + batch)
        text = [pocket.prompt(question) for question in asked[part]]
        inputs = processor(
            images=list(pictures[part]), text=text, padding=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=1)
        replies += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
    return replies


def test_answers_held_out_pictures_of_every_type(pocket_model) -> None:
    result = bench(*pocket_model, pocket_vqa(), [], [], batch=60, max_new_tokens=1)
    sighted, blind = result.rows
    assert sighted.accuracy >= 0.90, sighted
    assert blind.accuracy < 0.4, blind
    for name, score in sighted.types.items():
        assert score.value > 0.6, (name, score)
        assert score.value > blind.types[name].value + 0.2, (name, score)


def test_another_picture_gives_another_answer(pocket_model) -> None:
    scene, other = pocket.draw(0), pocket.draw(1)
    asked = pocket.questions(scene)
    right = answers(*pocket_model, [scene.picture] * len(asked), asked)
    wrong = answers(*pocket_model, [other.picture] * len(asked), asked)
    assert right != wrong


def test_left_padding_changes_nothing(pocket_model) -> None:
    model, processor = pocket_model
    scenes = [pocket.draw(seed) for seed in (100, 101)]
    pairs = [(scene.picture, one) for scene in scenes for one in pocket.questions(scene)]
    pictures, asked = [picture for picture, _ in pairs], [one for _, one in pairs]
    together = answers(model, processor, pictures, asked)
    assert together == answers(model, processor, pictures, asked, batch=1)

    text = [pocket.prompt(one) for one in asked]
    batch = processor(images=pictures, text=text, padding=True, return_tensors="pt")
    assert (batch["attention_mask"][:, 0] == 0).any()
    assert (batch["attention_mask"][:, -1] == 1).all()
    with torch.inference_mode():
        padded = model.generate(**batch, output_logits=True, return_dict_in_generate=True).logits[0]
        for row, picture, line in zip(padded, pictures, text, strict=True):
            inputs = processor(images=picture, text=line, return_tensors="pt")
            torch.testing.assert_close(row, model(**inputs).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_chat_template_gives_the_prompt(pocket_model) -> None:
    model, processor = pocket_model
    scene = pocket.draw(100)
    question = pocket.questions(scene)[0]
    content = [{"type": "image", "image": scene.picture}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == pocket.prompt(question)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    plain = processor(images=scene.picture, text=pocket.prompt(question), return_tensors="pt")
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert inputs["input_ids"][0, :2].tolist() == processor.tokenizer.convert_tokens_to_ids(
        ["<s>", "user:"]
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(tokens, skip_special_tokens=True).strip() == question.answer


def test_loads_like_any_checkpoint(pocket_model) -> None:
    model, processor = pocket_model
    plain, info = LlavaForConditionalGeneration.from_pretrained(
        pocket.CHECKPOINT, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not model.training
    assert plain.dtype == torch.float16
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight.float(), model.state_dict()[name]), name
    other = AutoProcessor.from_pretrained(pocket.CHECKPOINT)
    assert type(other) is type(processor)
    assert other.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()


def test_loads_in_another_dtype() -> None:
    assert pocket.load(torch.bfloat16)[0].dtype == torch.bfloat16


def test_missing_weights_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pocket, "CHECKPOINT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*; reinstall tokenprune-vlm"):
        pocket.load()


def test_missing_transformers_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenprune-vlm\[hf\]'"):
        pocket.load()


def test_checkpoint_is_small_and_in_float16() -> None:
    files = [file for file in pocket.CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4e6
    assert {"model.safetensors", "README.md", "results.json"} <= {file.name for file in files}


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = build(3)
    save(model, tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].half().float()), name


def test_training_pixels_are_those_of_the_processor(pocket_model) -> None:
    scene = pocket.draw(4)
    inputs = pocket_model[1](images=scene.picture, text="USER: <image>", return_tensors="pt")
    torch.testing.assert_close(pixels([scene]), inputs["pixel_values"], atol=1e-6, rtol=0)


def test_shared_prefix_trains_on_what_generate_computes(pocket_model) -> None:
    """The loss of all questions at once is the mean of their losses one by one."""
    model, processor = pocket_model
    scene = pocket.draw(5)
    asked = pocket.questions(scene)
    total = torch.zeros(())
    with torch.no_grad():
        for question in asked:
            line = f"{pocket.prompt(question)} {question.answer} </s>"
            inputs = processor(images=scene.picture, text=line, return_tensors="pt")
            ids = inputs["input_ids"][0]
            logs = model(**inputs).logits[0].log_softmax(-1)
            total -= logs[-3, ids[-2]] + logs[-2, ids[-1]]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        every = torch.arange(64)[None]
        loss, _ = LanguageLessons(model)([scene], [asked], every, every)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    torch.testing.assert_close(loss, total / len(asked), atol=1e-5, rtol=1e-4)
