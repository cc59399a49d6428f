"""A vLLM engine that another process controls by lines of JSON: `benchmarks.serving.vllm` starts three.

It runs in vLLM's environment and needs none of lorasb's other requirements: python vllm_engine.py OPTIONS.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Engine:
    """An engine in this process, and its commands; `memory` limits the bytes that the process may allocate."""

    def __init__(self, model: str, dtype: str, rows: int, slots: int, modules: list[str], memory: int = 0) -> None:
        if memory:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        from vllm import LLM

        lora: dict[str, Any] = {}
        if slots:
            lora = {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": 64}
            lora["lora_target_modules"] = modules
        self.llm = LLM(
            model,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=rows,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=400 << 20,
            **lora,
        )
        self.requests: dict[str, Any] = {}

    def add(self, names: list[str], folder: str) -> dict[str, Any]:
        """Load adapters; return the milliseconds of each."""
        from vllm.lora.request import LoRARequest

        times = []
        for name in names:
            self.requests[name] = LoRARequest(name, len(self.requests) + 1, f"{folder}/{name}")
            start = time.perf_counter()
            self.llm.llm_engine.add_lora(self.requests[name])
            times.append(1e3 * (time.perf_counter() - start))
        return {"ms": times}

    def replace(self, path: str) -> dict[str, Any]:
        """Load an adapter in place of the one with its name."""
        from vllm.lora.request import LoRARequest

        start = time.perf_counter()
        self.llm.llm_engine.add_lora(LoRARequest("policy", 1 << 20, path, load_inplace=True))
        return {"ms": 1e3 * (time.perf_counter() - start)}

    def run(self, names: list[str | None], tokens: int) -> dict[str, Any]:
        """Generate `tokens` tokens in one row per name (None: the base)."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(range(100, 108))} for _ in names]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        requests = [self.requests[name] if name else None for name in names]
        start = time.perf_counter()
        self.llm.generate(prompts, sampling, lora_request=requests if self.requests else None, use_tqdm=False)
        return {"ms": 1e3 * (time.perf_counter() - start), "resident": resident_bytes()}


def main() -> None:
    """Answer commands {"do": METHOD, ...} until the input ends."""
    engine = Engine(**json.loads(sys.argv[1]))
    print("ANSWER", json.dumps({"resident": resident_bytes()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print("ANSWER", json.dumps(getattr(engine, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
