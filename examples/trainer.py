"""Fine-tune with transformers.Trainer: two more lines than without adapters, in one process or several.

python examples/trainer.py [STEPS [MODEL]]
torchrun --nproc-per-node 2 examples/trainer.py [STEPS [MODEL]]

16 of 16 held-out lists right, such as dog red cat -> cat red dog
"""

import itertools
import os
import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def row(words: tuple[str, ...]) -> dict[str, list[int]]:
    prompt = tokenizer(f"Reverse: {' '.join(words)}\nAnswer:")["input_ids"]
    answer = tokenizer(" " + " ".join(reversed(words)))["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}  # only the answer is learned


lists = list(itertools.permutations(("red", "blue", "green", "white", "cat", "dog", "horse", "parrot"), 3))
random.Random(0).shuffle(lists)
held_out = lists[:16]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model = lorasb.patch(model, r=32)  # first line: R is trained, all else is frozen
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/trainer",
        max_steps=steps,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),  # 8 rows per step over all processes
        warmup_steps=0.1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # else processes on a CPU would train separately
        ddp_find_unused_parameters=False,
    ),
    train_dataset=[row(words) for words in lists[16:]],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[lorasb.InitCallback(lr="auto")],  # second line: A, B and R from the first step of full fine-tuning
)
trainer.train()
if trainer.is_world_process_zero():
    asked = [f"Reverse: {' '.join(words)}\nAnswer:" for words in held_out]
    prompts = tokenizer(asked, return_tensors="pt", padding=True).to(model.device)
    out = model.eval().generate(**prompts, max_new_tokens=8, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    said = [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    right = [text == " ".join(reversed(words)) for text, words in zip(said, held_out, strict=True)]
    print(f"{sum(right)} of 16 held-out lists right, such as {' '.join(held_out[0])} -> {said[0]}")
    model.save_pretrained("runs/trainer/adapter")
