"""Families with weights that libraries have quantised: `make test-quantised` installs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from support.families import FAMILIES, case_of, rescaled
from tokenprune_adapters.hf.contract import CHECKS

FOUND = [check for check in CHECKS if check.__name__[6:8] in ("f1", "f3", "f5")]
NAMED = {tiny.name: tiny for tiny in FAMILIES}
TOWERS = ("model.vision_tower", "model.vision_model", "model.multi_modal_projector")


def _eight_bits(model: Any) -> Any:
    """Without a threshold: by it, columns of all rows of a batch decide about each of them."""
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def _four_bits(model: Any) -> Any:
    """Of the language model alone: blocks of 64 weights do not fit the tiny towers."""
    pytest.importorskip("bitsandbytes")
    towers = [name for name, _ in model.named_modules() if name.startswith(TOWERS)]
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "model.connector", *towers],
    )


def _torchao(kind: str) -> Callable[[Any], Any]:
    def config(model: Any) -> Any:
        quantization = pytest.importorskip("torchao.quantization")
        version = {"version": 2} if "Int8" in kind else {}
        return transformers.TorchAoConfig(getattr(quantization, kind)(**version))

    return config


def _quanto(model: Any) -> Any:
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


QUANTISERS = {
    # Of logits of about 10. States are rounded to 8 bits as well, which a last bit may tip over.
    "bitsandbytes, 8 bits": (_eight_bits, 0.5),
    "bitsandbytes, 4 bits": (_four_bits, 0.1),
    "torchao, int8": (_torchao("Int8WeightOnlyConfig"), 5e-4),
    "torchao, float8": (_torchao("Float8WeightOnlyConfig"), 5e-4),
    "quanto, int8": (_quanto, 5e-4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "internvl", "smolvlm"])
@pytest.mark.parametrize("kind", QUANTISERS)
def test_quantised_models_keep_their_promises(kind: str, name: str, tmp_path: Path) -> None:
    """The plain model that is told what to hide is quantised as well."""
    quantiser, tolerance = QUANTISERS[kind]
    if "8 bits" in kind and name == "smolvlm":
        pytest.skip("rounded states move its logits by .2, by which another word wins")
    case = case_of(NAMED[name])
    model = case.build("sdpa")
    if "4 bits" in kind:
        text = model.config.text_config
        if name == "qwen2.5-vl":
            pytest.skip("widths of its tower and planes are tied to the text's")
        text.hidden_size, text.intermediate_size, text.head_dim = 64, 64, 16
        model = rescaled(type(model)(model.config))
    model.save_pretrained(tmp_path)
    config = quantiser(model)

    def build(attention: str) -> Any:
        made = type(model).from_pretrained(
            tmp_path,
            quantization_config=config,
            attn_implementation=attention,
            device_map="cpu",
            dtype=torch.float32,
        )
        weights = made.model.language_model if hasattr(made.model, "language_model") else made
        kinds = {type(each) for each in weights.parameters()}
        assert len(kinds) > 1  # some are quantised
        return made.eval()

    for check in FOUND:
        check(replace(case, build=build, tolerance=tolerance))
