"""Tiny models of real families, and batches for them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import environment  # noqa: F401  before anything reads it
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lorasb

transformers.utils.logging.disable_progress_bar()

Batch = dict[str, Tensor]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def causal(family: str, config: str = "", **more: object) -> nn.Module:
    """A language model of a family whose configuration uses Llama's field names."""
    fields = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0} | more
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{config or family}Config")(**fields))


def encoder(family: str, task: str = "ForSequenceClassification", **more: object) -> nn.Module:
    """A model of a family whose configuration uses BERT's field names."""
    config = getattr(transformers, f"{family}Config")(**SIZES | {"num_labels": 3, "max_position_embeddings": 64} | more)
    return getattr(transformers, f"{family}{task}")(config)


def llama(**more: object) -> nn.Module:
    return causal("Llama", tie_word_embeddings=True, **more)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def opt(**more: object) -> nn.Module:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "vocab_size": 99}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = transformers.OPTConfig(**sizes, **layers, **more)
    return transformers.OPTForCausalLM(config)


def vit() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes)
    return transformers.ViTForImageClassification(config)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gemma2": partial(causal, "Gemma2", head_dim=16, sliding_window=8),
    "roberta": partial(encoder, "Roberta", pad_token_id=1),
    "gpt2": gpt2,
    "mistral": partial(causal, "Mistral", sliding_window=8),
    "qwen3": partial(causal, "Qwen3", head_dim=16),
    "phi3": partial(causal, "Phi3"),
    "t5": t5,
    "qwen2": partial(causal, "Qwen2", tie_word_embeddings=True),
    "gemma3": partial(causal, "Gemma3", "Gemma3Text", head_dim=16, sliding_window=8),
    "bert": partial(encoder, "Bert"),
    "deberta": partial(encoder, "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "vit": vit,
    "mixtral": partial(causal, "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": partial(
        causal, "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    ),
}


def text(rows: int, tokens: int, seed: int) -> Batch:
    """Causal batch without padding; every second label of the first half is ignored."""
    ids = torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : tokens // 2 : 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def classes(rows: int, tokens: int, seed: int) -> Batch:
    """Classification batch."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (rows, tokens), generator=g)
    labels = torch.randint(0, 3, (rows,), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    return FAMILIES[family]().to(dtype).eval()


def pictures(rows: int, _: int, seed: int) -> Batch:
    """Image classification batch."""
    g = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=g),
        "labels": torch.randint(0, 3, (rows,), generator=g),
    }


BATCHES = {"roberta": classes, "bert": classes, "deberta": classes, "vit": pictures}


def batches_for(family: str, count: int = 3, rows: int = 2, tokens: int = 12) -> list[Batch]:
    """Batches that fit a family."""
    return [BATCHES.get(family, text)(rows, tokens, seed) for seed in range(count)]


def generated(model: nn.Module, ids: Tensor, **options: object) -> Tensor:
    """Five greedy tokens after each row of prompts."""
    usual = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **usual | options)


def patched(family: str = "llama", r: int = 4, dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    """A tiny model with an initialized adapter that clearly changes its outputs."""
    model = lorasb.patch(make(family, dtype=dtype), r=r, **fields)
    lorasb.initialize(model, batches_for(family), lr=2e-2, progress=False)
    return model


def started(
    family: str = "llama", r: int = 4, scaling: float = 1.0, **options: object
) -> tuple[nn.Module, lorasb.InitReport]:
    """A new model initialized with these options, and the report."""
    model = lorasb.patch(make(family), r=r, scaling=scaling)
    return model, lorasb.initialize(model, **{"batches": batches_for(family), "lr": 1e-3, "progress": False} | options)


def logits(model: nn.Module, family: str = "llama") -> Tensor:
    """The model's logits for a fixed batch."""
    batch = batches_for(family, count=1)[0]
    with torch.no_grad():
        return model(**batch).logits


def sharded(model: Any) -> Any:
    """Shard a PEFT model's decoder layers and the rest by FSDP2."""
    for block in (*model.get_base_model().model.layers, model):
        fully_shard(block)
    return model
