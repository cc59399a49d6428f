"""Scoring answers: numbers, boxed expressions, choices and texts without any; evaluating a model by its answers."""

import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import tolerances
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lorasb.app import scoring, tables
from lorasb.app.data import Example
from lorasb.app.evaluation import HeldOut, LanguageModeling, example_losses
from lorasb.app.scoring import LABEL_SCORES, SCORES, choice, equal_expressions, expression, final_number, is_right
from lorasb.app.settings import Settings
from lorasb.app.tokenize import Collator, encode


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4. The answer is: 4", Fraction(4)),
        ("so 3\n#### 1,234", Fraction(1234)),
        ("The answer is: -7/2 dollars", Fraction(-7, 2)),
        ("The answer is: $.50", Fraction(1, 2)),
        ("The answer is: 3.0", Fraction(3)),
        ("The answer is: 5\nno: #### 6", Fraction(6)),  # the last mark counts
        ("The answer is: 1/0", None),
        ("the answer may be 4", None),  # no mark
        ("The answer is: four", None),
        ("The answer is: 1,234.", Fraction(1234)),
        ("The answer is: -$3", Fraction(-3)),
        ("The answer is: - 3", Fraction(-3)),
    ],
)
def test_the_final_number_comes_after_the_last_mark(text: str, number: Fraction | None) -> None:
    assert final_number(text) == number


@given(st.fractions(max_denominator=1000), st.text(alphabet="abc \n", max_size=20))
def test_any_fraction_is_found_again(value: Fraction, before: str) -> None:
    assert final_number(f"{before}The answer is: {value}.") == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"thus \boxed{\frac{1}{2}} and so \boxed{\dfrac{3}{4}}", "3/4"),
        (r"The answer is: \left( 1, 2 \right).", "(1,2)"),
        (r"$\boxed{0.5\text{ cm}}$", "1/2"),
        (r"\boxed{10.05}", "201/20"),
        (r"\boxed{\text{odd}}", "odd"),
        (r"\boxed{\text{(B)}}", "(B)"),
        ("The answer is: .", None),
        (r"\boxed{\text{ cm}}", None),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{-\frac{3}{4}}", "-3/4"),
        (r"\boxed{90^{\circ}}", "90"),
        (r"\boxed{10,\!000}", "10000"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{2\sqrt3}", r"2\sqrt{3}"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\boxed{a \leftarrow b}", r"a\leftarrowb"),
        (r"The answer is: 4.\nMore", r"4.\nMore"),
        ("The answer is: 4.\nMore", "4"),
        (r"\boxed{1", None),  # never closed
        ("nothing", None),
    ],
)
def test_a_boxed_expression_is_read_in_one_form(text: str, found: str | None) -> None:
    assert expression(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the correct answer is Answer2, not answer1", "answer2"),
        ("the correct answer is true", "true"),
        ("Solution 1", "solution1"),
        ("untrue", None),
        ("answer7", None),
    ],
)
def test_the_first_choice_counts(text: str, found: str | None) -> None:
    assert choice(text) == found


@pytest.mark.parametrize(
    ("answer", "want", "score", "right"),
    [
        (" yes ", "yes", "exact", True),
        ("Yes", "yes", "exact", False),
        ("I add. The answer is: 18", "She has 18.\n#### 18", "number", True),
        ("18", "#### 18", "number", False),
        (r"The answer is: \dfrac{1}{2}", r"It is $\boxed{\frac{1}{2}}$.", "boxed", True),
        ("answer2", "the correct answer is answer2", "choice", True),
        ("The answer is: 18\n\n### Instruction: more\n### Response: #### 7", "#### 18", "number", True),  # more text
    ],
)
def test_an_answer_is_right_by_its_score_alone(answer: str, want: str, score: str, right: bool) -> None:
    assert is_right(answer, want, score) is right


@pytest.mark.parametrize("score", [name for name in SCORES if name not in ("exact", *LABEL_SCORES)])
def test_nothing_is_not_equal_to_nothing(score: str) -> None:
    """A reference text without a number must not make every answer right."""
    assert not is_right("who knows", "nobody knows", score)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        (r"(x+1)^2", r"x^2+2x+1", True),
        (r"\frac{\pi}{2}", r"\pi/2", True),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
        (r"x^2", r"x^3", False),
        ("BAC", "ABC", False),
        (r"|x|", "x", False),
        (r"\frac{3}{2}", r"3\frac{1}{2}", False),
        ("1/20000000000", "1/10000000000", False),
        (r"\frac{\theta}{2}", r"\frac{\pi}{2}", False),
        (r"\sqrt{2}", "1.414", False),
        ("(1,2)", "(1, 2)", True),
        ("[0,1)", "[0,1]", False),
        ("x<3", "x<4", False),
        (r"10^{99}", r"10^{98}", False),
        ("9" * 300, "9" * 299, False),
        ("__import__('os')", "1", False),
        ("", "x", False),
    ],
)
def test_expressions_are_equal_by_value(one: str, other: str, equal: bool) -> None:
    assert equal_expressions(one, other) is equal_expressions(other, one) is equal
    right = is_right(rf"so \boxed{{{one}}}", rf"\boxed{{{other}}}", "symbolic")
    assert right == (equal or expression(rf"\boxed{{{one}}}") == expression(rf"\boxed{{{other}}}"))


@pytest.mark.parametrize("text", [r"\binom{999999999}{499999999}", "9^{9^{9^9}}"])
def test_what_takes_longer_than_the_deadline_is_not_equal(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "DEADLINE", 1)
    assert not equal_expressions(text, "1")


def test_a_thread_compares_without_a_deadline() -> None:
    """Rewards run in threads."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(is_right, r"\boxed{2\sqrt{2}}", r"\boxed{\sqrt{8}}", "symbolic").result()


def test_without_its_parser_the_score_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"--score symbolic needs math-verify: pip install 'lorasb\[math\]'"):
        Settings(score="symbolic").check()


def test_a_checkpoints_own_settings_change_no_answer(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    examples = [Example("copy red red red", "red"), Example("copy two", "two")]
    encoded = [encode(example, tokenizer, 64) for example in examples]
    answers = []
    for penalty, beams in ((1.0, 1), (50.0, 3)):
        model.generation_config.repetition_penalty, model.generation_config.num_beams = penalty, beams
        held_out = HeldOut(examples, encoded, 2, 12)
        answers.append(LanguageModeling().evaluate(model, tokenizer, held_out, "").answers)
    assert answers[0] == answers[1]


def test_held_out_losses_are_taken_in_fp32(tiny: Path) -> None:
    """In bf16, the logits' dtype, each token's loss would be rounded to 8 bits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    rows = [encode(Example(f"copy {word} 3", word), tokenizer, 64) for word in ("red", "blue", "two")]
    batch = Collator(tokenizer.pad_token_id, model)(rows)
    labels = batch["labels"][:, 1:].clone()
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1].double()
        found = example_losses(model, batch)
    by_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    expected = by_token.sum(1) / (labels != -100).sum(1)
    tolerances.check(torch.tensor(found), expected, tolerances.fp32(1))


def test_the_shown_answers_have_a_wrong_one_if_there_is_one() -> None:
    examples = [Example(f"question {i}", f"answer {i}") for i in range(5)]
    right = [example.completion for example in examples]
    shown = tables.answers(examples, ["no"] * 5, [*right[:4], "wrong"], "plainly").columns[3]._cells
    assert [str(cell)[0] for cell in shown] == ["✓", "✓", "✗"]
    shown = tables.answers(examples, ["no"] * 5, right, "plainly").columns[3]._cells
    assert [str(cell)[0] for cell in shown] == ["✓"] * 3
