"""Initialization for reinforcement learning, from the first step that GRPO or DPO would take with all weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..constants import IGNORED
from ..init.sampling import rng_untouched
from ..init.task import modes_restored
from ..serving.training import token_losses

Reward = Callable[..., Sequence[float]]  # (prompts=, completions=) -> a number for each completion
SMALLEST_SPREAD = 1e-4  # added to a group's standard deviation, as GRPO does
# Sample from the policy itself: a checkpoint's generation settings would make it a different one.
NEUTRAL: dict[str, object] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "repetition_penalty": 1.0,
}
NEUTRAL |= {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": []}


class RewardError(ValueError):
    """A reward function failed, or returned something other than rewards."""


def checked_rewards(
    reward: Reward, prompts: Sequence[object], completions: Sequence[object], **columns: object
) -> list[float]:
    """Return one finite reward per completion; raise a RewardError if the function fails or returns anything else."""
    name = f"reward {getattr(reward, '__name__', type(reward).__name__)}"
    try:
        given = reward(prompts=list(prompts), completions=list(completions), **columns)
        values = [float(value) for value in given]
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # the caller's own code
        raise RewardError(f"{name} failed: {type(error).__name__}: {error}") from error
    if len(values) != len(completions):
        raise RewardError(f"{name}: expected {len(completions)} numbers, one for each completion, got {len(values)}")
    wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if wrong is not None:
        raise RewardError(f"{name}: expected finite numbers, got {values[wrong]} for {completions[wrong]!r}")
    return values


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return (reward − mean) / standard deviation for each reward of a group of at least two."""
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(value - mean) / (spread + SMALLEST_SPREAD) for value in rewards]


@torch.no_grad()
def reward_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    reward: Reward,
    *,
    generations: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Sample completions and make batches for `policy_loss`: one per prompt whose completions differ in reward.

    Initialize on all of them:

        batches = lorasb.reward_batches(model, tokenizer, prompts, reward)
        lorasb.initialize(model, iter(batches), lr=eta, loss_fn=lorasb.policy_loss)

    Args:
        model: the model that samples; an adapter that is not initialized does not change the base's output.
        tokenizer: the model's.
        prompts: texts, or chats: lists of messages with role and content, which end before the answer.
        reward: called as reward(prompts=..., completions=...); returns a finite number for each completion.
        generations: completions per prompt, at least two.
        max_new_tokens: maximum length of a completion.
        temperature: sampling temperature.
        seed: sampling seed; the global random state is unchanged.

    Returns:
        For each prompt `input_ids`, `attention_mask` and `completion_mask` [generations, T], and `advantages` and
        `temperature` [generations].

    Raises:
        ValueError: one text instead of a list of prompts, or fewer than two generations.
        RewardError: `reward` failed or returned something else, or no prompt's completions differ in reward.
    """
    if isinstance(prompts, str) or generations < 2:
        got = f"the text {prompts!r}" if isinstance(prompts, str) else f"generations={generations}"
        raise ValueError(f"expected a list of prompts and at least two generations of each, got {got}")
    batches = []
    with rng_untouched(), modes_restored(model):
        model.eval()
        torch.manual_seed(seed)
        for prompt in prompts:
            ids, mask = _sampled(model, tokenizer, prompt, generations, max_new_tokens, temperature)
            tokens = [row[-len(kept) :][kept] for row, kept in zip(ids, mask.bool(), strict=True)]
            values = checked_rewards(reward, [prompt] * generations, tokenizer.batch_decode(tokens, True))
            if max(values) > min(values):
                prompt_mask = mask.new_ones(generations, ids.shape[1] - mask.shape[1])
                batch = {"input_ids": ids, "attention_mask": torch.cat((prompt_mask, mask), 1)}
                batch["completion_mask"] = torch.cat((0 * prompt_mask, mask), 1)
                batch["advantages"] = torch.tensor(advantages(values), device=ids.device)
                batch["temperature"] = torch.full((generations,), temperature, device=ids.device)
                batches.append(batch)
    if not batches:
        raise RewardError(
            f"none of {len(prompts)} prompts has completions of different rewards among {generations}: a first step on "
            "rewards would be zero. Initialize from examples instead, or sample more (generations, temperature)"
        )
    return batches


def _sampled(
    model: Any, tokenizer: Any, prompt: Any, generations: int, max_new_tokens: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Ids [generations, T] of the prompt and completions, and a mask over the completions, up to their end."""
    device = next(model.parameters()).device
    chat = not isinstance(prompt, str)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) if chat else prompt
    given = tokenizer([text] * generations, return_tensors="pt", add_special_tokens=not chat).to(device)
    if not given["input_ids"].shape[1]:
        raise ValueError("a prompt has no tokens: expected nonempty text, or a tokenizer that adds a first token")
    ends = ends_of(tokenizer, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    options = NEUTRAL | {"temperature": temperature, "max_new_tokens": max_new_tokens, "do_sample": True}
    options |= {"pad_token_id": pad, "eos_token_id": ends or None}
    ids = model.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"], **options)
    completion = ids[:, given["input_ids"].shape[1] :]
    found = torch.isin(completion, torch.tensor(ends, dtype=completion.dtype, device=device)).long()
    return ids, (found.cumsum(1) - found == 0).long()


def ends_of(tokenizer: Any, model: Any) -> list[int]:
    """Return the tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(one for one in (tokenizer.eos_token_id, *own) if one is not None))


def policy_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """−mean over completions of advantage · mean over tokens of log π: GRPO's gradient for the policy that sampled.

    π is the softmax of logits / temperature, the distribution that was sampled from.

    Args:
        model: the policy.
        batch: one of `reward_batches`.
    """
    sums, counts = _log_probabilities(model, batch)
    return -(batch["advantages"] * sums / counts).mean()


def preference_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """−mean of (log π(chosen) − log π(rejected)): β/2 times its gradient is DPO's if the policy is the reference.

    Args:
        model: the policy.
        batch: `input_ids`, `attention_mask` and `completion_mask` [2n, T], the chosen first, as TRL collates them.
    """
    sums, _ = _log_probabilities(model, batch)
    chosen, rejected = sums.chunk(2)
    return (rejected - chosen).mean()


preference_loss.of_whole_batches = True  # type: ignore[attr-defined]  # a pair's rows are half a batch apart


def _log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Σ log π of each row's completion, and its number of tokens, both [n]."""
    ids, mask = batch["input_ids"], batch["completion_mask"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    if "temperature" in batch:  # from `reward_batches`
        logits = logits / batch["temperature"].to(logits.dtype)[:, None, None]
    labels = ids.masked_fill(mask == 0, IGNORED)
    return -token_losses(logits, labels).sum(1), mask[:, 1:].sum(1).clamp(min=1)
