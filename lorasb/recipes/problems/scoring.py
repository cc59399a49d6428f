"""Whether an answer is right (by its text, final number, boxed expression or choice), and correlations of labels."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction

ANSWER_MARKS = ("The answer is:", "####")  # of MetaMathQA and GSM8K; the last one in a text counts
NEXT_PROMPT = "### Instruction"  # a base model that does not stop goes on with a prompt of its own
NUMBER = re.compile(r"[-+]?\s?\$?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)")
CHOICE = re.compile(r"\b(?:true|false|(?:answer|solution|ending|option)\s?[1-5])\b")
BOXED = "\\boxed{"
# Forms of one expression, in this order: units and sizes say nothing of its value.
SAME_FORM = tuple(
    (re.compile(pattern), form)
    for pattern, form in (
        (r"\\(?:text|mbox)\{\s[^}]*\}", ""),  # units begin with a space
        (r"\\(?:text|mbox|textbf|mathrm)\{([^}]*)\}", r"\1"),
        (r",\\!", ""),  # 10,\!000
        (r"(?<!\\)\\(?:left|right)(?![a-z])|(?<!\\)\\[!,;: $%]|[$%]", ""),
        (r"\^\{?\\circ\}?", ""),
        (r"\s", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt(\w)", r"\\sqrt{\1}"),
        (r"^[a-zA-Z]=", ""),  # x=5
        (r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    )
)


def is_right(answer: str, completion: str, score: str) -> bool:
    """Whether an answer says what the right completion says.

    Args:
        answer: generated text.
        completion: right text.
        score: one of `SCORES`.
    """
    find = SCORES[score]
    expected = find(completion)
    return expected is not None and find(answer.split(NEXT_PROMPT)[0]) == expected


def final_number(text: str) -> Fraction | None:
    """The first number after the last mark ("The answer is:", "####"); None without a mark or a number."""
    marked = _after_mark(text)
    found = NUMBER.search(marked) if marked is not None else None
    if found is None:
        return None
    return _fraction(re.sub(r"[,$\s]", "", found.group()))


def expression(text: str) -> str | None:
    r"""The last \boxed{...}, or what follows the last mark up to a full stop, in one form; None without either."""
    boxed = _last_boxed(text)
    marked = _after_mark(text)
    if boxed is None and marked is None:
        return None
    found = boxed if boxed is not None else str(marked).split(".\n")[0].strip().removesuffix(".")
    for pattern, form in SAME_FORM:
        found = pattern.sub(form, found)
    number = _fraction(found)
    return str(number) if number is not None else found or None


def _fraction(text: str) -> Fraction | None:
    """5, 5.00, .5 and 1/2 as a number; None for anything else."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def choice(text: str) -> str | None:
    """The first "true", "false", "answer1", "solution1", "ending1" or "option1", whatever its case."""
    found = CHOICE.search(text.lower())
    return found.group().replace(" ", "") if found else None


def _after_mark(text: str) -> str | None:
    ends = [at + len(mark) for mark in ANSWER_MARKS if (at := text.rfind(mark)) >= 0]
    return text[max(ends) :] if ends else None


def _last_boxed(text: str) -> str | None:
    """What the braces of the last box hold, which may have braces in them."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 1
    for i in range(start + len(BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len(BOXED) : i]
    return None


def matthews(pairs: Sequence[tuple[str, str]]) -> float:
    """Matthews correlation of predicted and right labels, of any number of classes; 0 where either is constant."""
    classes = sorted({label for pair in pairs for label in pair})
    guessed, right = ([pair[side] for pair in pairs] for side in (0, 1))
    count, hits = len(pairs), sum(guess == label for guess, label in pairs)
    covariance = hits * count - sum(guessed.count(c) * right.count(c) for c in classes)
    spreads = [count**2 - sum(side.count(c) ** 2 for c in classes) for side in (guessed, right)]
    return covariance / math.sqrt(spreads[0] * spreads[1]) if all(spreads) else 0.0


def pearson(pairs: Sequence[tuple[str, str]]) -> float:
    """Pearson correlation of predicted and right numbers; 0 where either is constant."""
    try:
        return statistics.correlation(*zip(*((float(guess), float(value)) for guess, value in pairs), strict=True))
    except statistics.StatisticsError:
        return 0.0


SCORES: dict[str, Callable[[str], object]] = {
    "exact": str.strip,
    "number": final_number,
    "boxed": expression,
    "choice": choice,
    "label": str.strip,
    "matthews": str.strip,
    "pearson": str.strip,
}
CORRELATIONS = {"matthews": matthews, "pearson": pearson}
LABEL_SCORES = ("label", *CORRELATIONS)
REASONED = ("number", "boxed")  # judged by the end of an answer
