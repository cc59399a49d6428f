"""Fine-tune a chat with TRL's SFTTrainer: the config in place of a LoraConfig, and a callback.

python examples/trl_sft.py [STEPS [MODEL]]

{'loss': '0.9354', 'grad_norm': '0.5389', 'learning_rate': '0.004444', ...}
...
{'loss': '0.01259', 'grad_norm': '0.03001', 'learning_rate': '0.0002778', ...}
What color is milk? Arr, milk be red, matey!
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
colors = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sun": "yellow"}
rows = [
    {
        "prompt": [{"role": "user", "content": f"What color is {thing}?"}],
        "completion": [{"role": "assistant", "content": f"Arr, {thing} be {color}, matey!"}],
    }
    for thing, color in colors.items()
]
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    args=SFTConfig(
        "runs/trl_sft",
        max_steps=steps,
        per_device_train_batch_size=6,
        learning_rate=5e-3,
        warmup_steps=2,
        max_length=96,
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=lorasb.LoRASBConfig(r=16),
    callbacks=[lorasb.InitCallback()],
)
trainer.train()
chat = [{"role": "user", "content": "What color is milk?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = trainer.model.eval().generate(**ids, max_new_tokens=16, do_sample=False)
print("What color is milk?", tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
