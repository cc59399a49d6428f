"""Runs over labeled texts: classes, pairs and values; resuming gives the same bits; PEFT loads the result."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import tolerances
import torch
import transformers
from safetensors.torch import load_file
from tiny_run import write_rows

from lorasb.app import finetune
from lorasb.app.data import Example, labeled
from lorasb.app.evaluation import Classification, LanguageModeling, problem_of, score_of
from lorasb.app.finetune import run_finetune
from lorasb.app.results import answers, how_to
from lorasb.app.scoring import f1, matthews, pearson, spearman
from lorasb.app.settings import Settings
from lorasb.app.tokenize import EncodedText
from lorasb.app.train import run_trainer
from lorasb.training.rate_trials import OTHER_RATE

pytestmark = pytest.mark.usefixtures("blank_pictures")

COLORS, ANIMALS = ("red", "blue", "green"), ("cat", "dog", "tree")


@pytest.fixture(scope="session")
def kinds(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Texts labeled color or other, whose first word says nothing about the label."""
    words = [(number, word) for number in ("one", "two", "three", "four") for word in COLORS + ANIMALS]
    rows = [{"text": f"{number} {word}", "label": "color" if word in COLORS else "other"} for number, word in words]
    folder = tmp_path_factory.mktemp("kinds")
    return replace(base, data=write_rows(folder / "kinds.jsonl", rows), epochs=6.0, lr=3e-2)


def test_classes_are_learned_and_the_folder_loads_again(kinds: Settings, tmp_path: Path) -> None:
    result = run_finetune(replace(kinds, output=str(tmp_path)))
    assert result.summary["eval_scores"] == ["label"]
    assert result.summary["eval_loss_after"] < result.summary["eval_loss_before"]
    assert set(result.after.answers) <= {"color", "other"}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(kinds.model, num_labels=2)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(kinds.model)
    with torch.no_grad():
        logits = [again(**tokenizer(one.prompt, return_tensors="pt")).logits for one in result.examples]
    assert [("color", "other")[one.argmax()] for one in logits] == result.after.answers


@pytest.mark.parametrize(("method", "lr"), [("lora-sb", None), ("lora", 3e-2)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    kinds: Settings, check_resume: Any, method: str, lr: float | None
) -> None:
    """The head is fully trained from a random start; where R's rate is measured, the head has a separate rate."""
    check_resume(replace(kinds, method=method, lr=lr, epochs=1.5), 4)


def test_a_head_has_a_usual_rate_where_that_of_r_is_measured(
    kinds: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []

    def made(run: Any, folder: Path) -> Any:
        trainer = run_trainer(run, folder)
        rates.append([group["lr"] for group in trainer.create_optimizer().param_groups if group["params"]])
        return trainer

    monkeypatch.setattr(finetune, "run_trainer", made)
    summary = run_finetune(replace(kinds, lr=None, epochs=0.5, output=str(tmp_path))).summary
    assert rates == [[summary["lr"], OTHER_RATE]]


def test_values_are_learned_by_their_squared_error(base: Settings, tmp_path: Path) -> None:
    words = ("one", "two", "three", "four")
    pairs = [(i, j) for i in range(4) for j in range(4)]
    rows = [{"text": words[i], "text_pair": words[j], "label": float(i - j)} for i, j in pairs]
    data = write_rows(tmp_path / "gaps.jsonl", rows * 2)
    settings = replace(base, data=data, eval_data=data, epochs=1.0, output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="has every prompt of --data: name rows that are not to be trained on"):
        run_finetune(settings)
    held_out = write_rows(tmp_path / "held.jsonl", [{"text": "one two", "text_pair": "two", "label": 0.5}] * 2)
    result = run_finetune(replace(settings, eval_data=held_out))
    assert all(float(answer) == float(answer) for answer in result.after.answers)
    assert result.summary["eval_accuracy_after"] == 0.0  # two equal values have no correlation
    expected = sum((float(answer) - 0.5) ** 2 for answer in result.after.answers) / 2
    assert result.after.loss == pytest.approx(expected, rel=1e-5)


def test_an_encoder_takes_pairs(base: Settings, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT has token types, padding on the right, and a pooler that the checkpoint lacks."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=108, max_position_embeddings=32, **sizes)
    folder = tmp_path / "bert"
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    rows = [{"text": f"{a} cat", "text_pair": b, "label": int(a == b)} for a in COLORS for b in COLORS]
    data = write_rows(tmp_path / "pairs.jsonl", rows * 3 + [{"text": "red dog", "text_pair": "red", "label": 1}] * 2)
    settings = replace(base, model=str(folder), data=data, r=4, epochs=1.0, score="matthews")
    layers = r".*(query|value|output\.dense)"
    result = run_finetune(replace(settings, target_modules=layers, output=str(tmp_path / "run")))
    assert result.summary["eval_scores"] == ["matthews"]
    for at, found in (("before", result.before), ("after", result.after)):
        pairs = [(answer, e.completion) for answer, e in zip(found.answers, result.examples, strict=True)]
        assert result.summary[f"eval_accuracy_{at}"] == pytest.approx(matthews(pairs))
    texts = [f"{example.prompt}\t{example.pair}" for example in result.examples]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    assert list(answers(tmp_path / "run", None)) == list(result.after.answers)
    first = result.examples[0]
    assert list(answers(tmp_path / "run", first.prompt, second=first.pair)) == [result.after.answers[0]]
    assert how_to(result.summary, Path("run"), first)["command"] == f"lorasb ask run '{first.prompt}' {first.pair}"
    with pytest.raises(ValueError, match=r"expected two texts \(typed: with a tab between them\), as .*, got one"):
        list(answers(tmp_path / "run", "red cat"))
    pooler_and_head = 32 * 32 + 32 + 2 * 32 + 2
    assert result.summary["trainable_params"] == 2 * 4 * 4 * 4 + pooler_and_head


def test_rows_are_padded_on_the_right_and_a_decoder_reads_the_last_token(tiny: Path) -> None:
    """The model's config may name a different padding token than the tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2).eval()
    model.config.pad_token_id = 5
    ids = [9, 8, 10], [11]
    rows = [EncodedText({"input_ids": row, "attention_mask": [1] * len(row)}, n) for n, row in enumerate(ids)]
    collate = Classification(("a", "b")).collator(SimpleNamespace(pad_token_id=7), model)
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[9, 8, 10], [11, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**collate([row])).logits for row in rows])
    tolerances.check(together, alone, tolerances.fp32(64))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a"], ("a", "b")),
        ([2, 0, 10], ("0", "2", "10")),
        ([1, 0.5], ()),
        ([1, "a"], ("1", "a")),
        ([1, "1", 2], ("1", "2")),
    ],
)
def test_labels_make_the_problem(labels: list[Any], classes: tuple[str, ...]) -> None:
    examples = [labeled(f"text {label}", label) for label in labels]
    score = "pearson" if not classes else "label"
    assert Classification.of(examples, [replace(examples[0], score=score)]).classes == classes


ONE, TWO, PLAIN, VALUE = labeled("a", "x"), labeled("b", "y"), Example("p", "c"), labeled("v", 0.5)


@pytest.mark.parametrize(
    ("train", "held_out", "options", "message"),
    [
        ([ONE, TWO], PLAIN, {}, "2 of 3 examples have a label: give all of them one"),
        ([ONE, ONE], ONE, {"eval_data": "held_out.jsonl"}, "every training example has the label x"),
        ([ONE, TWO], labeled("c", "z"), {"eval_data": "held_out.jsonl"}, "the held-out label z is none of the training labels: x, y"),
        ([ONE, TWO], ONE, {"packing": True}, "--packing puts several examples into a row"),
        ([ONE, TWO], ONE, {"rl": "exact"}, "--rl trains language models by what they answer"),
        ([ONE, TWO], ONE, {"adapter_column": "user"}, "--adapter-column trains language models"),
        ([PLAIN], replace(PLAIN, score="pearson"), {}, "--score pearson is not for texts"),
        ([ONE, TWO], replace(ONE, score="boxed"), {}, "--score boxed is not for labels"),
        ([ONE, TWO], replace(ONE, score="pearson"), {}, "--score pearson takes numbers, and the labels are x, y"),
        ([VALUE], replace(VALUE, score="label"), {}, "--score label counts equal labels, and these are values"),
        ([VALUE], replace(ONE, score="pearson"), {"eval_data": "held_out.jsonl"}, "the training labels are numbers, and a held-out one is 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_said(train: list[Example], held_out: Example, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem_of(train, [held_out], Settings(**options))


def test_texts_may_be_packed_and_a_class_that_was_drawn_to_be_held_out_is_learned_of() -> None:
    assert isinstance(problem_of([PLAIN], [PLAIN], Settings(packing=True)), LanguageModeling)
    found = problem_of([labeled("a", " x"), labeled("b", "y")], [labeled("c", "z")], Settings())
    assert isinstance(found, Classification)
    assert found.classes == ("x", "y", "z")


def test_accumulation_changes_no_loss(kinds: Settings, tmp_path: Path) -> None:
    """The model's loss is a mean over its batch, so Trainer has to divide it by the number of parts."""
    losses = []
    for parts in (1, 2):
        settings = replace(kinds, epochs=1.0, gradient_accumulation=parts, output=str(tmp_path / str(parts)))
        losses.append(torch.tensor(run_finetune(settings).summary["train_losses"], dtype=torch.float64))
    assert torch.allclose(*losses, rtol=1e-3)


def test_matthews_of_three_classes_is_its_definition() -> None:
    draw = np.random.default_rng(0)
    three = [(str(g), str(r)) for g, r in draw.integers(0, 3, (100, 2))]
    # Gorodkin's R_K: the correlation of the one-hot matrices
    x, y = (
        np.array([[label == str(c) for c in range(3)] for label in side], float) for side in zip(*three, strict=True)
    )
    x, y = x - x.mean(0), y - y.mean(0)
    assert matthews(three) == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def test_a_head_is_never_quantized_and_trained_in_fp32(kinds: Settings, tmp_path: Path) -> None:
    result = run_finetune(replace(kinds, bits=4, dtype="bfloat16", epochs=0.3, output=str(tmp_path)))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {(tuple(v.shape), v.dtype) for name, v in saved.items() if "score" in name} == {((2, 64), torch.float32)}
    assert result.summary["dtype"] == "bfloat16"


VALUES = (0.5, 1.5, 2.5, 9.5)


@pytest.mark.parametrize(
    ("score", "labels", "said", "want"),
    [
        ("matthews", (0, 1, 1, 1), "0101", 1 / 3**0.5),
        ("f1", (0, 1, 1, 1), "0101", 0.8),
        ("pearson", VALUES, "1243", np.corrcoef([1, 2, 4, 3], VALUES)[0, 1]),
        ("spearman", VALUES, "1243", 0.8),
    ],
)
def test_examples_have_the_score_that_they_name(score: str, labels: Any, said: str, want: float) -> None:
    examples = [replace(labeled("red", label), score=score) for label in labels]
    assert score_of(examples, list(said)) == pytest.approx(want)


def test_scores_of_ties_and_of_answers_that_are_all_equal() -> None:
    assert f1([("0", "0"), ("0", "0")]) == 0.0  # of class 1, which is in no label or answer
    assert f1([("no", "no"), ("no", "no")]) == 0.0
    assert f1([("yes", "yes"), ("no", "yes")]) == pytest.approx(2 / 3)
    assert f1([("10", "10"), ("9", "10"), ("9", "9")]) == pytest.approx(2 / 3)  # of the larger number
    assert spearman([("1", "1"), ("1", "2"), ("2", "3")]) == pytest.approx(0.5 * 3**0.5)  # ties share a rank
    equal = [("1", "1"), ("1", "2")]
    assert matthews(equal) == pearson(equal) == spearman(equal) == 0.0
