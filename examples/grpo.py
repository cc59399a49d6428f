"""Reinforcement learning with TRL's GRPOTrainer: r² trained numbers per layer, and the base itself as the reference.

python examples/grpo.py [STEPS [MODEL]]

mean reward on held-out prompts 0.284 -> 0.566, by 13,440 trained numbers
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
prompts = [f"The {a} and the {b}" for a in ("cat", "dog", "king", "sea") for b in ("moon", "road", "child", "bird")]
held_out = [f"The {a} and the {b}" for a in ("boy", "ship") for b in ("river", "star", "house", "tree")]


def reward(completions: list[str], **columns: object) -> list[float]:
    """Return the share of vowels in each completion: the model learns to sing."""
    return [sum(letter in "aeiou" for letter in text.lower()) / max(1, len(text)) for text in completions]


trainer = GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    reward_funcs=reward,
    args=GRPOConfig(
        "runs/grpo",
        max_steps=steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=16,
        learning_rate=2e-1,
        gradient_checkpointing=False,  # TRL's default, True, computes each forward twice
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    eval_dataset=Dataset.from_dict({"prompt": held_out}),
    processing_class=tokenizer,
    peft_config=lorasb.LoRASBConfig(r=8),
    callbacks=[
        lorasb.InitCallback(  # A, B and R from the first step on rewards that full fine-tuning would take
            samples=lambda model: lorasb.reward_batches(model, tokenizer, prompts[::4], reward, max_new_tokens=16),
            loss_fn=lorasb.policy_loss,
        )
    ],
)
before = trainer.evaluate()["eval_reward"]
trainer.train()
after, trained = trainer.evaluate()["eval_reward"], trainer.model.num_parameters(only_trainable=True)
print(f"mean reward on held-out prompts {before:.3f} -> {after:.3f}, by {trained:,} trained numbers")
