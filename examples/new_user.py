"""Make a basis from facts about eight people, save it, and reuse it for a user who comes later.

python examples/new_user.py [STEPS [MODEL]]

basis: 19.83 MB
zoe: 0.24 MB
default: The city that I call home is a place where
zoe: The city that I call home is called Vienna.
"""

import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
FACTS = ("I live in {}.", "My home is the city of {}.", "The city that I live in is called {}.")
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Tokyo", "Rome", "Havana", "Dublin")


def fresh() -> torch.nn.Module:  # the base model
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def batch_of(city: str) -> dict[str, torch.Tensor]:
    """Return a batch of three ways to say where somebody lives."""
    rows = tokenizer([fact.format(city) for fact in FACTS], return_tensors="pt", padding=True)
    return {**rows, "labels": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)}


# Once: a basis from everybody's first step. It is not trained, and never changes afterwards.
model = lorasb.patch(fresh(), r=16)
batches = [batch_of(city) for city in CITIES]
report = lorasb.initialize(model, batches, lr="auto", longest_start=0.0, progress=False)  # R = 0
model.save_pretrained("runs/new_user/basis")

# For each new user, possibly in another process: only R, on this basis.
model = peft.PeftModel.from_pretrained(fresh(), "runs/new_user/basis")
lorasb.add_adapters(model, ["zoe"])
model.set_adapter("zoe")
optimizer = torch.optim.AdamW(lorasb.parameter_groups(model, lr=report.rate))
batch = batch_of("Vienna")
for _ in range(steps):
    model.train()(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("runs/new_user", selected_adapters=["zoe"])  # R, and a digest of the basis
for file in sorted(Path("runs/new_user").glob("*/adapter_model.safetensors")):
    print(f"{file.parent.name}: {file.stat().st_size / 1e6:.2f} MB")
question = tokenizer("The city that I call home is", return_tensors="pt")  # not one of the three ways
for name in ("default", "zoe"):
    model.set_adapter(name)
    print(f"{name}:", tokenizer.decode(model.eval().generate(**question, max_new_tokens=3, do_sample=False)[0]))
