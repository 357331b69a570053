"""Match of a reply with the accepted answers."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ANNOTATORS = 10
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def credit(reply: str, answers: Sequence[str]) -> float:
    """How right `reply` is, between 0 and 1, after `plain` on both sides.

    With fewer than ten answers, one must be equal. Ten or more are those of annotators and count
    as in VQAv2: a third for each that is equal, at most 1 (without its leave-one-out mean).

    >>> credit("The cat.", ["cat", "kitten"])
    1.0
    """
    same = sum(plain(reply) == plain(answer) for answer in answers)
    if len(answers) >= _ANNOTATORS:
        return min(1.0, same / 3)
    return float(same > 0)


def plain(text: str) -> str:
    """Lower case, without articles, punctuation at the ends of words and double spaces.

    What would leave nothing stays: the option "A" is neither an empty reply nor "The".

    >>> plain(" It is a  Top-left. "), plain("(A)"), plain("...")
    ('it is top-left', 'a', '...')
    """
    lower = text.lower()
    return _words(_ARTICLES.sub(" ", lower)) or _words(lower) or " ".join(lower.split())


def _words(text: str) -> str:
    words = (word.strip(string.punctuation) for word in text.split())
    return " ".join(word for word in words if word)
