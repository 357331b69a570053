"""The model card, written from the numbers of a training run."""

from __future__ import annotations

from typing import Any

from .model import VOCABULARY

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, visual-token-compression, toy-model]
---
# Pocket LLaVA

A miniature of LLaVA-1.5 for testing visual-token compression where no large model fits: stock
`LlavaForConditionalGeneration` with {parameters:,} parameters, trained from nothing on synthetic
pictures. It is an instrument for experiments and tests of software; a ranking of methods on it is
no evidence for their ranking on a real model.

```python
from tokenprune_adapters import pocket

model, processor = pocket.load()
scene = pocket.draw(0)
question = pocket.questions(scene)[0]
inputs = processor(images=scene.picture, text=pocket.prompt(question), return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0, -2:]), question.answer)
```

The folder also loads with `LlavaForConditionalGeneration.from_pretrained` and
`AutoProcessor.from_pretrained`, from transformers 5.4 on.

## Model

Pictures of 64 x 64 pixels in patches of 8: 64 visual tokens and [CLS]. `CLIPVisionModel`: 6 layers,
96 channels, MLP 192, 4 heads. Features are those of layer -2 without [CLS]; the stock projector;
`LlamaConfig` with 6 layers, 96 channels, MLP 256, 4 heads, and a vocabulary of words.
Prompt: `<s> USER: <image> QUESTION ? ASSISTANT:`; one word answers.

## Task

Two to four coloured objects (circle, square, triangle, star, cross, ring, or a handwritten 1, 3, 4
or 6) on coloured noise, among gray clutter. Five types of question: colour, kind, existence (half
are answered by no, and the no is half true), count, and where (a quarter of the picture).
Pictures, questions and handwriting of the test were never trained on.

The handwriting is from "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI
Machine Learning Repository, CC BY 4.0).

## Training

{cpu_minutes} minutes of one CPU core, seed {seed}, fp32, AdamW; every step has new pictures.

1. The tower, {tower_steps} steps of {tower_batch} pictures: [CLS] says for each kind whether it is
   there and in which colour. **Auxiliary loss:** a linear read-out of each patch, at the layer that
   the language model gets, says the kind and colour of the object on the patch and the quarter of
   the picture that the patch lies in. So position is in the features by construction.
2. Projector and language model, {language_steps} steps of {language_batch} pictures with twelve
   questions each, on answer and `</s>` only; the tower is frozen. **Jittered positions:** for half
   of the pictures the position ids of the visual tokens stay in order but advance by 0, 1 or 2, so
   that the place of an object is better read from features than from position ids.

The model never saw a compressed input: in training no visual token was dropped, merged or masked.

## Results

{pictures} held-out pictures (`draw(0)` to `draw({last})`), through the processor and batched
`generate`, from the fp16 weights in this folder. Standard errors are clustered by picture and say
nothing about other training seeds. Blind: the same questions about a plain gray picture.

| questions | accuracy | blind | asked |
|---|---|---|---|
{rows}

## What it cannot do, and what numbers from it do not show

- It knows {words} words, this task and nothing else. Other pictures, other wordings and more than
  one picture or turn give arbitrary words.
- **What is salient is what is asked.** [CLS] was trained on the very facts that questions are
  about, so compression by [CLS] attention is favoured. No question is about background or clutter.
- Count seems to be read from the share of tokens that show objects: selection by salience, even by
  an oracle that keeps every object, makes it a guess. Where falls too at about a quarter of the
  tokens, with original position ids as with new ones. Report every type apart.
- With few visual tokens left it often adds a second word instead of stopping. Its first word is
  its answer: ask for `max_new_tokens=1`.
- The questions are easy and the pictures are sparse: about a sixth of the patches shows an object.
- One training seed; a claim about the order of methods needs several.
"""


def card(results: dict[str, Any]) -> str:
    """The text of the model card.

    Args:
        results: what `train.run` writes to `results.json`.
    """
    training, test = results["training"], results["test"]
    sighted, blind = results["scores"]["sighted"], results["scores"]["blind"]
    rows = [
        f"| {name} | {100 * row['accuracy']:.1f} ± {100 * row['error']:.1f} % "
        f"| {100 * blind[name]['accuracy']:.1f} % | {row['questions']} |"
        for name, row in sighted.items()
    ]
    return _CARD.format(
        parameters=training["parameters"],
        cpu_minutes=training["cpu_minutes"],
        seed=training["seed"],
        tower_steps=training["tower"]["steps"],
        tower_batch=training["tower"]["batch"],
        language_steps=training["language"]["steps"],
        language_batch=training["language"]["batch"],
        pictures=test["pictures"],
        last=test["pictures"] - 1,
        rows="\n".join(rows),
        words=len(VOCABULARY),
    )
