"""Model card, written from the numbers of a training run."""

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
`LlamaConfig` with 8 layers, 96 channels, MLP 256, 4 heads, and a vocabulary of {words} words.
Prompt: `<s> USER: <image> QUESTION ? ASSISTANT:`; one word answers.

## Task: Pocket-VQA

Two to four coloured objects (circle, square, triangle, star, cross, ring, or a handwritten 1, 3, 4
or 6) on coloured noise, among gray clutter of one kind; in every other picture a white sign with
two handwritten digits. Nine types of question:

| type | asks for | chance by guessing |
|---|---|---|
| colour, kind | the one of the object with that kind, that colour | 1 in 6, 1 in 10 |
| existence | is there a red star? half no, and a no is half true | 1 in 2 |
| count | 2, 3 or 4 objects | 1 in 3 |
| where | the quarter of the picture | 1 in 4 |
| relation | is the star left of the ring? half no | 1 in 2 |
| read | the two digits of the sign | 1 in 16 |
| texture | of the background: plain, striped, lined, checked | 1 in 4 |
| clutter | the shape of the gray things: diamond, bar, post | 1 in 3 |

Background and clutter are **not** salient: no loss of [CLS] asks for them, and a selection of what
is salient throws them away. The test is fixed: 2,089 questions about 500 pictures
(`tokenprune.bench.pocket(full=True)`); its pictures, questions and handwriting were never trained
on.

The handwriting is from "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI
Machine Learning Repository, CC BY 4.0).

## Training

{cpu_minutes} minutes of one CPU core, seed {seed}, fp32, AdamW; every step has new pictures. The
curve is in `results.json`.

1. The tower, {tower_steps} steps of {tower_batch} pictures: [CLS] says for each kind whether it is
   there and in which colour, and what the sign reads. **Auxiliary losses:** linear read-outs of
   each patch, at the layer that the language model gets, say the kind and colour of the object on
   the patch, the object's number in reading order, the digit of the sign and its place, the kind of
   clutter, the texture, and the row and column of the patch. So position, and a numbering of the
   objects, are in the features by construction.
2. Projector and language model, {language_steps} steps of {language_batch} pictures with about
   seventeen questions each, on answer and `</s>` only; the tower is frozen. Every fourth step shows
   the 64 visual tokens as they are. The others have **jittered positions**: the ids of the visual
   tokens stay in order but advance by 0, 1 or 2, so that the place of an object is better read from
   features than from position ids. And they have **copies**: up to 64 visual tokens appear more
   than once, of which any share, from none to all, shows objects, so that the number of objects is
   better read from features than from the share of tokens that show objects. The learning rate
   falls to zero in {language_restart} steps, and once more from half the height in the rest.

The model never saw a compressed input: in training no visual token was dropped, merged or masked.
Jitter and copies ready it for what compression leaves all the same: a model trained without them
loses `where` and `count` under any selection of what is salient, an oracle's too.

## Results

{questions:,} held-out questions about {pictures} pictures, from the fp16 weights in this folder.
Standard errors are clustered by picture and say nothing about other training seeds. Blind: the same
questions about a plain gray picture.

| questions | accuracy | blind | asked |
|---|---|---|---|
{rows}

## What it cannot do, and what numbers from it do not show

- It knows {words} words, this task and nothing else. Other pictures, other wordings and more than
  one picture or turn give arbitrary words.
- **What is salient is what most questions ask for.** [CLS] was trained on the very facts that most
  of the nine types are about, so compression by [CLS] attention is favoured there; texture and
  clutter are where it must lose. Report every type apart.
- It was trained on one-word answers: ask for `max_new_tokens=1`. With few visual tokens left it may
  add a second word instead of stopping.
- The questions are easy and the pictures are sparse: about a quarter of the patches shows an object
  or the sign.
- A claim about the order of methods needs several training seeds; the results page of tokenprune
  has three. The shipped seed is the better of the first two without compression.
"""


def card(results: dict[str, Any]) -> str:
    """The text of the model card.

    Args:
        results: what `train.run` writes to `results.json`.
    """
    training = results["training"]
    sighted, blind = results["scores"]["vanilla"], results["scores"]["blind"]
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
        language_restart=training["language"]["restart"],
        questions=results["test"]["questions"],
        pictures=results["test"]["pictures"],
        rows="\n".join(rows),
        words=len(VOCABULARY),
    )
