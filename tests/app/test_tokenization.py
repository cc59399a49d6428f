"""From examples to tensors: which tokens are learned and which are cut, packing, and the order of training."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import lorasb
from lorasb.app import tokenize
from lorasb.app.data import Example
from lorasb.app.prepare import prepare
from lorasb.app.settings import Settings
from lorasb.app.tokenize import IGNORED, ByLength, Collator, Encoded, encode
from lorasb.utils.atomic_files import write_json

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
LAST_TURN_ONLY = "{% for m in messages %}{{ loop.length }} {{ m['content'] }} {% endfor %}"
NEVER_EMPTY = CHATML + "{% if not messages %}{{ raise_exception('empty') }}{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
TURNS = (("user", "copy red"), ("assistant", "red"), ("user", "copy two"), ("assistant", "two"))
CHAT = tuple({"role": role, "content": content} for role, content in TURNS)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture
def chatting(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Encode a chat by a template; return it and the part that is learned, as text."""

    def run(template: str | None, chat: Any = CHAT, length: int = 200) -> tuple[Encoded, str]:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        encoded = encode(Example("copy two", "two", chat), tokenizer, length)
        labeled = zip([*encoded.prompt, *encoded.completion], encoded.labels, strict=True)
        return encoded, tokenizer.decode([i for i, label in labeled if label != IGNORED])

    return run


def test_pieces_of_a_text_get_no_space_of_sentencepieces_own(tmp_path: Path) -> None:
    """Its tokenizers put a space before every text: answers that follow another piece would be learned with it."""
    words = ["▁ask", "\n", "▁red", "r", "e", "d", "red", "▁", "ask"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    llama = transformers.LlamaTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d")][:0])
    for prompt, answer in (("ask\n", "red"), ("ask", "red")):
        encoded = encode(Example(prompt, answer), llama, 50)
        joined = prompt + ("" if prompt.endswith("\n") else " ") + answer
        whole = llama(joined)["input_ids"]
        assert [*encoded.prompt, *encoded.completion] == [*whole, llama.eos_token_id]


def test_every_turn_of_the_assistants_is_learned(chatting: Any, tokenizer: Any, model: Any) -> None:
    encoded, learned = chatting(CHATML)
    want = tokenizer.decode(tokenizer("red <|end|> two")["input_ids"]) + " <eos>"
    assert learned == want
    whole = tokenizer.apply_chat_template(list(CHAT[:-1]), add_generation_prompt=True, tokenize=False)
    assert list(encoded.prompt) == tokenizer(whole)["input_ids"]
    batch = Collator(0, model)([encoded, Encoded((5,), (6, 7))])
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [len(tokenizer(want)["input_ids"]), 2]
    assert batch["logits_to_keep"] == encoded.tail + 1 < len(encoded)


@pytest.mark.parametrize(
    ("template", "chat", "length"),
    [(CHATML, CHAT, 8), (LAST_TURN_ONLY, CHAT, 200), (NEVER_EMPTY, CHAT[1:], 200)],
    ids=["a long chat loses its beginning", "a template rewrites earlier turns", "an assistant opens"],
)
def test_the_last_turn_alone_is_learned(chatting: Any, template: str, chat: Any, length: int) -> None:
    encoded, learned = chatting(template, chat, length)
    assert learned == "two <eos>"
    if length == 8:
        assert (len(encoded), encoded.learned) == (8, ())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM, r"refuses a chat \(no system; roles: system, user, .* 'be brief'"),
        (None, "tokenizer has no chat template: give prompt and completion"),
    ],
)
def test_a_chat_without_a_template_for_it_is_refused(chatting: Any, template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chatting(template, ({"role": "system", "content": "be brief"}, *CHAT))


def test_long_prompts_lose_their_beginning(tokenizer: Any) -> None:
    encoded = encode(Example("one two " * 20 + "three", "red"), tokenizer, 8)
    assert len(encoded) == 8
    assert tokenizer.decode(encoded.prompt).endswith("three")


@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [(20, 1, (14, 2)), (12, 20, (12, 4)), (2, 20, (2, 14)), (20, 20, (14, 2)), (4, 1, (4, 2))],
)
def test_a_held_out_question_that_fits_is_whole_and_others_leave_room_for_an_answer(
    tokenizer: Any, prompt: int, answer: int, kept: tuple[int, int]
) -> None:
    words = Example(" ".join(["one"] * prompt), " ".join(["red"] * answer))
    encoded = encode(words, tokenizer, 16, whole_prompt=True)
    assert (len(encoded.prompt), len(encoded.completion)) == kept
    assert encoded.is_cut == (prompt + answer > 15)


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"), [("", "b", " b"), ("a", "b", " b"), ("a\n", "b", "b"), ("a", "  b\n", "  b\n")]
)
def test_white_space_of_the_users_own_is_kept(prompt: str, completion: str, learned: str) -> None:
    class Letters:
        bos_token_id, eos_token_id = None, 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    encoded = encode(Example(prompt, completion), Letters(), 64)
    assert "".join(map(chr, encoded.completion[:-1])) == learned
    assert encoded.prompt == (tuple(map(ord, prompt)) or (0,))  # so that the first token of a text is predicted, too


def test_before_and_after_are_measured_alike() -> None:
    model = models.make("gpt2")
    encoded = [Encoded((3, 4, 5) * k, (7, 8)) for k in (1, 3)]
    before = Collator(0, model)(encoded)
    after = Collator(0, lorasb.patch(model, r=4))(encoded)
    assert before.keys() == after.keys() >= {"position_ids", "logits_to_keep"}


def test_a_tokenizer_without_an_end_of_text_is_refused(base: Settings, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if key != "eos_token"})
    with pytest.raises(ValueError, match=r"the tokenizer of --model .*model' has no eos_token, which ends an answer"):
        prepare(replace(base, model=str(folder)))


def test_prompts_are_not_learned(tokenizer: Any, model: Any) -> None:
    examples = [Example("copy red", "red"), Example("copy the blue cat", "blue cat")]
    encoded = [encode(e, tokenizer, 64) for e in examples]
    batch = Collator(tokenizer.pad_token_id, model)(encoded)
    assert batch["logits_to_keep"] == 4
    assert batch["labels"].shape == (2, 4)
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 3]  # the words and the end of the text
    assert batch["labels"][:, -1].tolist() == [tokenizer.eos_token_id] * 2
    assert batch["position_ids"][0, -1] == len(encoded[0]) - 1


def test_trimming_the_head_changes_no_loss(tokenizer: Any, model: Any) -> None:
    encoded = [encode(Example("copy red " * k, "red"), tokenizer, 64) for k in (1, 3)]
    collate, losses = Collator(tokenizer.pad_token_id, model), []
    for collate.trims in (True, False):
        losses.append(model(**collate(encoded)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def some_examples(count: int) -> list[Encoded]:
    draw = random.Random(1)
    lengths = ((draw.randint(1, 9), 3) for _ in range(count))
    return [Encoded(*(tuple(draw.choices(range(3, 99), k=k)) for k in both)) for both in lengths]


@given(lengths=st.lists(st.integers(2, 20), max_size=60))
def test_packs_are_those_of_first_fit_by_decreasing_length(lengths: list[int]) -> None:
    examples = [tokenize.Encoded((1,) * (n - 1), (i,)) for i, n in enumerate(lengths)]
    rows: list[list[tokenize.Encoded]] = []
    for example in sorted(examples, key=len, reverse=True):
        row = next((row for row in rows if sum(map(len, row)) + len(example) <= 32), None)
        if row is None:
            rows.append(row := [])
        row.append(example)
    packs = tokenize.pack(examples, 32)
    assert packs == [tuple(row) for row in rows]
    assert max(map(tokenize.row_length, packs), default=0) <= 32


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_loss_of_packs_is_that_of_their_examples(family: str) -> None:
    model: Any = models.make(family)
    examples = some_examples(9)
    tokenize.check_model(model)
    batches = (tokenize.collate_packs(tokenize.pack(examples, 30), 0), Collator(0, model)(examples))
    with torch.no_grad():
        packed, alone = (model(**batch).loss.item() for batch in batches)
    assert packed == pytest.approx(alone, rel=1e-5)


def test_a_model_whose_packed_examples_see_one_another_is_refused() -> None:
    model: Any = models.make("llama")
    forward = model.forward
    model.forward = lambda input_ids, position_ids=None, **rest: forward(input_ids)
    with pytest.raises(ValueError, match="--packing: in a LlamaForCausalLM packed examples see one another"):
        tokenize.check_model(model)
    model.forward = lambda input_ids: forward(input_ids)
    with pytest.raises(ValueError, match="--packing: this model takes no position_ids"):
        tokenize.check_model(model)


LENGTHS = tuple(random.Random(0).choices(range(5, 60), k=1003))


def test_every_row_comes_once_an_epoch_and_the_seed_decides() -> None:
    order = ByLength(LENGTHS, 16, 3)
    first = list(order)
    assert sorted(first) == list(range(1003))
    assert list(ByLength(LENGTHS, 16, 3)) == first != list(ByLength(LENGTHS, 16, 4))
    order.set_epoch(1)
    state = torch.get_rng_state()
    assert sorted(order) == sorted(first)
    assert list(order) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_little_is_padded_and_steps_are_whole() -> None:
    steps = ByLength(LENGTHS, 16, 0).order(0)
    assert [len(rows) for rows in steps] == [16] * 62 + [11]
    assert sum(len(rows) * max(LENGTHS[i] for i in rows) for rows in steps) < 1.1 * sum(LENGTHS)
    longest = [max(LENGTHS[i] for i in rows) for rows in steps[:-1]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
