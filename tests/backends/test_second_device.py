"""A model on another device than the CPU: with eager kernels only, with fp64 and without it (as Apple's GPUs)."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import ROOT, python
from tolerances import SECOND_DEVICE

SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device, compiled here."""
    if shutil.which("c++") is None:
        pytest.skip("the device needs a C++ compiler")
    path, torch_root = tmp_path_factory.mktemp("device") / "second.so", Path(torch.__file__).parent
    headers = [f"-isystem{torch_root / place}" for place in ("include", "include/torch/csrc/api/include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++20", "-shared", "-fPIC", abi, *headers]
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["c++", *flags, SUPPORT / "second_device.cpp", *libraries, "-o", path], check=True)
    return path


def test_results_equal_those_on_the_cpu(library: Path, tmp_path: Path) -> None:
    """Nothing mixes tensors of two devices, and a device without fp64 or factorizations gets the same results."""
    printed = python("-W", "ignore", SUPPORT / "second_device.py", library, tmp_path, LORASB_BACKEND="eager")
    found: dict[str, list[float]] = json.loads(printed.splitlines()[-1])
    assert len(found) == 15
    assert {name: both for name, both in found.items() if not all(one <= SECOND_DEVICE.rtol for one in both)} == {}
