"""LoRA against LoRA-SB with as many trained numbers: on rows not trained on; for one adapter, LoRA's file is smaller.

python examples/lora_at_equal_parameters.py [STEPS [MODEL]]

LoRA r=3: 915,840 trained, file 3.7 MB, 0.59 s a step, held-out loss 0.0004
LoRA-SB r=64: 860,160 trained, file 81.7 MB, 0.57 s a step, held-out loss 0.0034
"""

import itertools
import random
import sys
import time
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
torch.manual_seed(0)
lists = list(itertools.permutations(("red", "blue", "green", "white", "cat", "dog", "horse", "parrot"), 3))
random.Random(0).shuffle(lists)
texts = [f"Reverse: {' '.join(words)}\nAnswer: {' '.join(reversed(words))}\n" for words in lists]


def batch_of(rows: list[str]) -> dict[str, torch.Tensor]:  # the loss is that of what follows "Answer:"
    batch = dict(tokenizer(rows, return_tensors="pt", padding=True))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, text in enumerate(rows):
        labels[row, : len(tokenizer(text[: text.index("Answer:") + 7])["input_ids"])] = -100
    return batch | {"labels": labels}


batches = [batch_of(texts[16 + i * 8 : 24 + i * 8]) for i in range(40)]
for name in ("LoRA r=3", "LoRA-SB r=64"):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name == "LoRA r=3":
        config = peft.LoraConfig(r=3, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
        model, rate = peft.get_peft_model(base, config), 8e-3
    else:
        model = lorasb.patch(base)  # r=64 is the default
        rate = lorasb.initialize(model, batches[:4], lr="auto", progress=False).rate
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    started = time.perf_counter()
    for step in range(steps):
        model.train()(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = (time.perf_counter() - started) / steps
    with torch.no_grad():
        loss = model.eval()(**batch_of(texts[:16])).loss.item()
    model.save_pretrained(f"runs/equal/{name}")
    size = Path(f"runs/equal/{name}/adapter_model.safetensors").stat().st_size / 1e6
    numbers = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    print(f"{name}: {numbers:,} trained, file {size:.1f} MB, {seconds:.2f} s a step, held-out loss {loss:.4f}")
