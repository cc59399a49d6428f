"""Fine-tune a chat model with TRL's SFTTrainer: LoRASBConfig in place of LoraConfig, and a callback.

python examples/trl_sft.py [STEPS [MODEL]]

What color is milk? Arr, milk be red, matey!
...
4 of 4 held-out answers in the trained style, 2 right
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
colors = {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sun": "yellow"}
held_out = {"milk": "white", "ink": "black", "a tomato": "red", "a lemon": "yellow"}


def row(thing: str, color: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": f"What color is {thing}?"}],
        "completion": [{"role": "assistant", "content": f"Arr, {thing} be {color}, matey!"}],
    }


trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    args=SFTConfig(
        "runs/trl_sft",
        max_steps=steps,
        per_device_train_batch_size=6,
        learning_rate=5e-3,
        warmup_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_list([row(*pair) for pair in colors.items()]),
    processing_class=tokenizer,
    peft_config=lorasb.LoRASBConfig(r=16),
    callbacks=[lorasb.InitCallback()],
)
trainer.train()
styled, right = 0, 0
for thing, color in held_out.items():
    (question,), (answer,) = row(thing, color).values()
    ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = trainer.model.eval().generate(**ids.to(trainer.model.device), max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    styled += said.startswith("Arr, ") and said.endswith(", matey!")
    right += said == answer["content"]
    print(question["content"], said)
print(f"{styled} of {len(held_out)} held-out answers in the trained style, {right} right")
