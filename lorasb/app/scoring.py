"""Scores of answers (by text, final number, boxed expression or choice), and correlations of labels."""

from __future__ import annotations

import math
import re
import statistics
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction

ANSWER_MARKS = ("The answer is:", "####")  # of MetaMathQA and GSM8K; the last one in a text counts
NEXT_PROMPT = "### Instruction"  # a base model that does not stop continues with another prompt
NUMBER = re.compile(r"[-+]?\s?\$?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)")
CHOICE = re.compile(r"\b(?:true|false|(?:answer|solution|ending|option)\s?[1-5])\b")
DEADLINE = 3  # seconds to parse an expression, and to compare two: slower ones count as not equal
WORD = re.compile(r"^[A-Za-z]{2,}$")  # a word, not a product of variables
# Replacements that normalize an expression, in this order: units and sizes do not change its value.
SAME_FORM = (
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


def is_right(answer: str, completion: str, score: str) -> bool:
    """Return True if an answer matches the right completion."""
    find = SCORES[score]
    expected, found = find(completion), find(answer.split(NEXT_PROMPT)[0])
    if expected is None or found is None:
        return False
    return found == expected or (score == "symbolic" and equal_expressions(str(found), str(expected)))


def final_number(text: str) -> Fraction | None:
    """The first number after the last mark ("The answer is:", "####"); None without a mark or a number."""
    found = NUMBER.search(_after_mark(text))
    return _fraction(re.sub(r"[,$\s]", "", found.group())) if found else None


def expression(text: str) -> str | None:
    r"""Return the last \boxed{...}, or the text from the last mark to a period, normalized; None without either."""
    found = _last_boxed(text)
    if found is None:
        found = _after_mark(text).split(".\n")[0].strip().removesuffix(".")
    for pattern, form in SAME_FORM:
        found = re.sub(pattern, form, found)
    number = _fraction(found)
    return str(number) if number is not None else found or None


def equal_expressions(one: str, other: str) -> bool:
    """Return True if two LaTeX expressions, such as 2√2 and √8, have the same value by math-verify."""
    from math_verify import parse, verify

    if WORD.search(one) or WORD.search(other):
        return False
    # The deadline needs a signal, which only the main thread gets: rewards in other threads have no deadline.
    deadline = DEADLINE if threading.current_thread() is threading.main_thread() else None
    found, expected = (parse(f"${text}$", parsing_timeout=deadline) for text in (one, other))
    return bool(verify(expected, found, timeout_seconds=deadline))


def _fraction(text: str) -> Fraction | None:
    """Convert 5, 5.00, .5 or 1/2 to a number; None for anything else."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def choice(text: str) -> str | None:
    """Return the first "true", "false", "answer1", "solution1", "ending1" or "option1", ignoring case."""
    found = CHOICE.search(text.lower())
    return found.group().replace(" ", "") if found else None


def _after_mark(text: str) -> str:
    """The text after the last mark; "" without one."""
    ends = [at + len(mark) for mark in ANSWER_MARKS if (at := text.rfind(mark)) >= 0]
    return text[max(ends, default=len(text)) :]


def _last_boxed(text: str) -> str | None:
    """Return the content of the last box, which may have nested braces."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, letter in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[:i]
    return None


def matthews(pairs: Sequence[tuple[str, str]]) -> float:
    """Matthews correlation of predicted and right labels, of any number of classes; 0 where either is constant."""
    classes = sorted({label for pair in pairs for label in pair})
    guessed, right = ([pair[side] for pair in pairs] for side in (0, 1))
    count, hits = len(pairs), sum(guess == label for guess, label in pairs)
    covariance = hits * count - sum(guessed.count(c) * right.count(c) for c in classes)
    spreads = [count**2 - sum(side.count(c) ** 2 for c in classes) for side in (guessed, right)]
    return covariance / math.sqrt(spreads[0] * spreads[1]) if all(spreads) else 0.0


def number(label: str) -> float | None:
    """Return a label as a number; None if it is not one."""
    try:
        return float(label)
    except ValueError:
        return None


def in_order(label: str) -> tuple[bool, float, str]:
    """Return a sort key for classes: numbers first, by value."""
    return number(label) is None, number(label) or 0.0, label


def f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the F1 of the second of two classes (1 of 0 and 1): 2·hits / (predicted + right); 0 without either."""
    labels = {label for pair in pairs for label in pair}
    if len(labels) == 1 and "1" not in labels:  # a single label is nearly always the first class
        return 0.0
    positive = "1" if labels <= {"0", "1"} else max(labels, key=in_order)
    hits = sum(guess == label == positive for guess, label in pairs)
    named = sum((guess == positive) + (label == positive) for guess, label in pairs)
    return 2 * hits / named if named else 0.0


def pearson(pairs: Sequence[tuple[str, str]]) -> float:
    """Pearson correlation of predicted and right numbers; 0 where either is constant."""
    return _correlation([float(guess) for guess, _ in pairs], [float(value) for _, value in pairs])


def spearman(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the Spearman correlation: Pearson's of the ranks; equal values share their mean rank."""
    return _correlation(_ranks([float(guess) for guess, _ in pairs]), _ranks([float(value) for _, value in pairs]))


def _correlation(guesses: Sequence[float], values: Sequence[float]) -> float:
    try:
        return statistics.correlation(guesses, values)
    except statistics.StatisticsError:
        return 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) - 1) / 2 for value in values]


CORRELATIONS = {"matthews": matthews, "pearson": pearson, "spearman": spearman, "f1": f1}  # of all pairs at once
OF_VALUES = ("pearson", "spearman")
LABEL_SCORES = ("label", *CORRELATIONS)
REASONED = ("number", "boxed", "symbolic")  # scored by the end of an answer
SCORES: dict[str, Callable[[str], object]] = {
    "exact": str.strip,
    "number": final_number,
    "boxed": expression,
    "symbolic": expression,
    "choice": choice,
    **dict.fromkeys(LABEL_SCORES, str.strip),
}
