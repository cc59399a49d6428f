"""Initialization on rewards and preferences uses GRPO's and DPO's own gradients, in TRL's trainers and by hand."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer_runs import arguments, usual
from transformers import PreTrainedModel, TrainerState
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import lorasb
from lorasb.layers.lookup import layers_with
from lorasb.training.reinforcement import RewardError, advantages, checked_rewards

WORDS = ["one", "two", "red", "cat"]
IGNORE_TRL_WARNINGS = pytest.mark.filterwarnings("ignore")  # TRL's warnings about pinned memory and casts


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return transformers.AutoTokenizer.from_pretrained(tiny, padding_side="left")


def fresh(folder: Path) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def length(completions: list[str], **given: object) -> list[float]:
    return [float(len(text)) for text in completions]


def options(folder: Path) -> dict[str, object]:
    return usual(folder) | {"max_steps": 2, "learning_rate": 1e-3, "bf16": False, "save_strategy": "no"}


def grpo(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, **given: object) -> GRPOTrainer:
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "beta": 0.04}
    return GRPOTrainer(
        model,
        reward_funcs=length,
        args=GRPOConfig(**options(folder) | sizes),
        train_dataset=Dataset.from_list([{"prompt": f"copy {word}"} for word in WORDS * 4]),
        processing_class=tokenizer,
        **given,
    )


def examples(tokenizer: Tokenizer) -> list[dict[str, Tensor]]:
    ids = [tokenizer(f"copy {word} {word}", return_tensors="pt")["input_ids"] for word in WORDS]
    return [{"input_ids": one, "labels": one} for one in ids]


@IGNORE_TRL_WARNINGS
@pytest.mark.parametrize("start", ["rewards", "zero"])
def test_grpo_takes_the_config_and_a_start(start: str, tiny: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = [f"copy {word}" for word in WORDS]
    callback = {
        "rewards": lorasb.InitCallback(
            samples=lambda model: lorasb.reward_batches(model, tokenizer, prompts, length, max_new_tokens=6),
            loss_fn=lorasb.policy_loss,
        ),
        "zero": lorasb.InitCallback(samples=examples(tokenizer), longest_start=0.0),
    }[start]
    trainer = grpo(fresh(tiny), tokenizer, tmp_path, peft_config=lorasb.LoRASBConfig(r=8), callbacks=[callback])
    trainer.train()
    assert trainer.ref_model is None  # the reference is the model without the adapter
    assert callback.report is not None
    trains = {name.split(".")[-2] for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trains == {"lorasb_R"}
    cores = [layer.lorasb_R["default"] for layer in layers_with(trainer.model, "default").values()]
    assert all(bool(core.any()) for core in cores)
    # the first step's KL to the reference is zero only if R starts at zero
    first = next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert (first < 1e-6) == (start == "zero")


def test_a_start_on_rewards_takes_all_completions(tiny: Path, tokenizer: Tokenizer) -> None:
    model = lorasb.patch(fresh(tiny), r=8)
    chats = [[{"role": "user", "content": f"copy {word}"}] for word in WORDS]
    batches = lorasb.reward_batches(model, tokenizer, chats, length, max_new_tokens=6)
    whole = sum(len(batch["input_ids"]) for batch in batches)
    report = lorasb.initialize(model, iter(batches), lr=1e-3, loss_fn=lorasb.policy_loss, progress=False)
    assert report.num_samples == whole > 8
    rendered = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, tokenize=False)
    assert batches[0]["input_ids"][0].tolist()[:2] == tokenizer(rendered)["input_ids"][:2]


def test_a_reward_that_fails_leaves_every_modules_mode(tiny: Path, tokenizer: Tokenizer) -> None:
    model = fresh(tiny).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RewardError):
        lorasb.reward_batches(model, tokenizer, ["one"], lambda **given: 1 / 0)
    assert [module.training for module in model.modules()] == modes


def test_a_start_on_preferences_takes_every_pair_whole(tiny: Path, tmp_path: Path) -> None:
    """Seven pairs, three at a time: a batch has two rows per pair, half a batch apart."""
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7 + i, 8], "rejected_ids": [10 + i]} for i in range(7)]
    seen: list[int] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(len(batch["input_ids"]))
        assert batch["completion_mask"][: seen[-1] // 2].sum() == 2 * (seen[-1] // 2)  # the chosen, two tokens each
        return lorasb.preference_loss(model, batch)

    model = lorasb.patch(fresh(tiny), r=4)
    collate = DataCollatorForPreference(pad_token_id=0)
    loader = DataLoader(rows, batch_size=3, collate_fn=collate)
    callback = lorasb.InitCallback(loss_fn=loss)
    args = arguments(tmp_path, warmup_steps=1)
    callback.on_train_begin(args, TrainerState(max_steps=3), None, model=model, train_dataloader=loader)
    assert set(seen) == {6, 2}
    with pytest.raises(ValueError, match="this loss needs whole ones"):
        lorasb.initialize(model, [], lr=1e-3, stability=True, loss_fn=lorasb.preference_loss)


@IGNORE_TRL_WARNINGS
@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_takes_the_config_and_its_data(tiny: Path, tokenizer: Tokenizer, tmp_path: Path, precomputed: bool) -> None:
    callback, pair = lorasb.InitCallback(loss_fn=lorasb.preference_loss), {"chosen": " one", "rejected": " two"}
    trainer = DPOTrainer(
        fresh(tiny),
        args=DPOConfig(**options(tmp_path) | {"precompute_ref_log_probs": precomputed}),
        train_dataset=Dataset.from_list([pair | {"prompt": f"copy {word}"} for word in WORDS * 2]),
        processing_class=tokenizer,
        peft_config=lorasb.LoRASBConfig(r=8),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.report is not None
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] > 0  # the start is a step toward the chosen completions


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.grad.clone()


def log_probabilities(model: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of every token after the first [rows, tokens - 1]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1] / temperature
    return logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]


def test_the_preference_gradient_is_dpos(tiny: Path) -> None:
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]} for _ in range(3)]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    model, reference, beta = fresh(tiny).double(), fresh(tiny).double(), 0.1
    sums = ((log_probabilities(one, batch) * batch["completion_mask"][:, 1:]).sum(1) for one in (model, reference))
    (chosen, rejected), (old_chosen, old_rejected) = (of_one.chunk(2) for of_one in sums)
    dpo = -torch.nn.functional.logsigmoid(beta * ((chosen - old_chosen) - (rejected - old_rejected))).mean()
    want = gradient(model, dpo)
    got = gradient(model, lorasb.preference_loss(model, batch))
    tolerances.check_scaled(beta / 2 * got, want, tolerances.FP32_LOGITS)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_policy_gradient_is_grpos(temperature: float, tiny: Path, tokenizer: Tokenizer) -> None:
    model = fresh(tiny).double()
    options = {"generations": 4, "max_new_tokens": 5, "temperature": temperature}
    (batch, *_) = lorasb.reward_batches(model, tokenizer, ["copy red"], length, **options)
    mask = batch["completion_mask"][:, 1:]
    per_token = log_probabilities(model, batch, temperature)
    ratio = (per_token - per_token.detach()).exp()  # 1, with the gradient of log π
    clipped = torch.minimum(ratio * batch["advantages"][:, None], ratio.clamp(0.8, 1.2) * batch["advantages"][:, None])
    want = gradient(model, -((clipped * mask).sum(1) / mask.sum(1)).mean())
    got = gradient(model, lorasb.policy_loss(model, batch))
    tolerances.check_scaled(got, want, tolerances.FP32_LOGITS)


def test_completions_end_at_their_end_and_sampling_leaves_the_random_state(tiny: Path, tokenizer: Tokenizer) -> None:
    model = lorasb.patch(fresh(tiny), r=4)
    state = torch.get_rng_state()
    first = lorasb.reward_batches(model, tokenizer, ["copy red", "one"], length, max_new_tokens=6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = lorasb.reward_batches(model, tokenizer, ["copy red", "one"], length, max_new_tokens=6, seed=1)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    for batch in first:
        assert batch["advantages"].mean().abs() < 1e-6
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
            ends = (ids[mask.bool()] == tokenizer.eos_token_id).nonzero().flatten().tolist()
            assert ends in ([], [int(mask.sum()) - 1])


def test_completions_end_where_the_model_ends_them_and_are_of_the_policy(tiny: Path, tokenizer: Tokenizer) -> None:
    """A checkpoint may define end tokens unknown to its tokenizer, and its own generation settings."""
    model = fresh(tiny)
    given = {"generations": 4, "max_new_tokens": 30}
    plain = lorasb.reward_batches(model, tokenizer, ["copy red"], length, **given)[0]
    model.generation_config.update(min_p=0.5, no_repeat_ngram_size=1, suppress_tokens=[5, 6], typical_p=0.5)
    assert torch.equal(
        lorasb.reward_batches(model, tokenizer, ["copy red"], length, **given)[0]["input_ids"], plain["input_ids"]
    )
    ends = plain["input_ids"][:, -3].unique().tolist()
    model.generation_config.eos_token_id = ends
    (batch,) = lorasb.reward_batches(model, tokenizer, ["copy red"], length, **given)
    for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        places = torch.isin(ids, torch.tensor([tokenizer.eos_token_id, *ends])) & mask.bool()
        assert places.nonzero().flatten().tolist() in ([], [int(mask.nonzero().max())])
    assert int(batch["completion_mask"].sum(1).min()) < 30


@pytest.mark.parametrize(
    ("prompts", "generations", "message"),
    [
        ("one", 4, "got the text 'one'"),
        (["one"], 1, "got generations=1"),
        ([[{"role": "user", "content": ""}]], 2, "a prompt has no tokens"),
    ],
)
def test_what_is_no_prompt_is_refused(
    prompts: Any, generations: int, message: str, tiny: Path, tokenizer: Tokenizer
) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{{ '' }}"
    with pytest.raises(ValueError, match=message):
        lorasb.reward_batches(fresh(tiny), bare, prompts, length, generations=generations)


def test_advantages_are_of_a_group() -> None:
    found = advantages([1.0, 0.0])
    assert found[0] == pytest.approx(-found[1])
    assert advantages([5.0, 5.0]) == [0.0, 0.0]


REWARDS: dict[str, tuple[Callable[..., object], str]] = {
    "raises": (lambda **given: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    "NaN": (lambda **given: [1.0, float("nan")], "expected finite numbers, got nan for 'b'"),
    "too few": (lambda **given: [1.0], "expected 2 numbers, one for each completion, got 1"),
    "no list": (lambda **given: 1.0, "failed: TypeError: 'float' object is not iterable"),
    "exits": (lambda **given: sys.exit("no key"), "failed: SystemExit: no key"),
    "takes them": (lambda completions, **given: completions.clear() or [1.0], "expected 2 numbers, one for each"),
    "no numbers": (lambda **given: ["yes", "no"], "failed: ValueError: could not convert"),
}


@pytest.mark.parametrize("kind", REWARDS)
def test_bad_rewards_are_named_in_a_line(kind: str) -> None:
    reward, message = REWARDS[kind]
    with pytest.raises(RewardError, match=message):
        checked_rewards(reward, ["p", "p"], ["a", "b"])


def test_rewards_that_never_differ_are_refused(tiny: Path, tokenizer: Tokenizer) -> None:
    reward = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    with pytest.raises(RewardError, match="none of 1 prompts has completions of different rewards among 4"):
        lorasb.reward_batches(fresh(tiny), tokenizer, ["one"], reward, generations=4)


@IGNORE_TRL_WARNINGS
def test_prompts_alone_are_no_samples(tiny: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, callback = lorasb.LoRASBConfig(r=8), lorasb.InitCallback()
    trainer = grpo(fresh(tiny), tokenizer, tmp_path, peft_config=config, callbacks=[callback])
    with pytest.raises(ValueError, match=r"got lists, as with GRPO's prompts: .* InitCallback\(samples=batches\)"):
        trainer.train()
