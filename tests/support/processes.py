"""Run Python in a separate process, by default at the root of the repository, and ranks of a process group."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("LORASB_TRITONS")  # has a folder per version of Triton; `make test-all` creates it
TRITONS = sorted(path for path in Path(FOLDER).iterdir() if path.is_dir()) if FOLDER else []


def attempt(
    *arguments: object, given: str | None = None, cwd: Path = ROOT, program: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python, whatever its exit status; `given` is its input, `variables` are set in its environment."""
    command, environment = [program, *map(str, arguments)], os.environ | variables
    return subprocess.run(command, cwd=cwd, env=environment, input=given, capture_output=True, text=True, timeout=500)


def python(*arguments: object, **options: Any) -> str:
    """Run Python by `attempt` and return what it prints; it must succeed."""
    done = attempt(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_each(codes: Sequence[str], **variables: str) -> list[str]:
    """Run each code where neither PEFT nor lorasb is imported, and return what it prints; all must succeed."""
    script = ROOT / "tests" / "support" / "fresh_imports.py"
    found = json.loads(python("-W", "ignore", script, given=json.dumps(codes), **variables))
    assert {code: text for code, (status, text) in zip(codes, found, strict=True) if status} == {}
    return [text for _, text in found]


def run_ranks(count: int, folder: Path, work: Callable[[int], object]) -> None:
    """Do each rank's work in a fork of this process, as if torchrun had started it; all must succeed in 500 seconds."""
    running = {_fork(rank, count, folder / f"group-of-{count}", work) for rank in range(count)}
    end, failed = time.monotonic() + 500, False
    while running:
        ended = {child: status for child in running for found, status in [os.waitpid(child, os.WNOHANG)] if found}
        running -= ended.keys()
        if not failed and (any(ended.values()) or time.monotonic() > end):  # the others would wait for the failed rank
            failed = True
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    assert not failed


def _fork(rank: int, count: int, file: Path, work: Callable[[int], object]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            warnings.simplefilter("ignore")
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
                "MASTER_PORT": 29500,
            }
            os.environ |= {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"} | {
                n: str(v) for n, v in place.items()
            }
            AcceleratorState._reset_state(reset_partial_state=True)
            patience = timedelta(seconds=60)
            dist.init_process_group("gloo", f"file://{file}", timeout=patience, rank=rank, world_size=count)
            work(rank)
            dist.destroy_process_group()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child
