"""Fine-tune with transformers.Trainer: two lines more than without adapters.

python examples/trainer.py [STEPS [MODEL]]

{'loss': '0.6838', 'grad_norm': '2.027', 'learning_rate': '0.001722', 'epoch': '0.2381'}
...
{'loss': '0.002489', 'grad_norm': '0.01922', 'learning_rate': '5.556e-05', 'epoch': '0.9524'}
215,040 numbers were trained
Reverse: parrot red dog -> dog red parrot
"""

import itertools
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def row(words: tuple[str, ...]) -> dict[str, list[int]]:
    """A prompt and its answer; the answer's tokens alone are learned."""
    prompt = tokenizer(f"Reverse: {' '.join(words)}\nAnswer:")["input_ids"]
    answer = tokenizer(" " + " ".join(reversed(words)))["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


words = ("red", "blue", "green", "white", "cat", "dog", "horse", "parrot")
rows = [row(three) for three in itertools.permutations(words, 3)]
model = lorasb.patch(model, r=32)  # first line: R is trained, all else is frozen
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/trainer",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        warmup_steps=max(1, steps // 10),
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[lorasb.InitCallback()],  # second line: A, B and R from the first step of full fine-tuning
)
trainer.train()
print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} numbers were trained")
question = tokenizer("Reverse: parrot red dog\nAnswer:", return_tensors="pt")
answer = model.eval().generate(**question, max_new_tokens=8, do_sample=False)[0, question["input_ids"].shape[1] :]
print("Reverse: parrot red dog ->", tokenizer.decode(answer, skip_special_tokens=True).strip())
model.save_pretrained("runs/trainer/adapter")
