"""Arguments of prepared launches against those of ordinary ones, as Triton's own launcher hands them to the driver: of
the installed Triton, and in `make test-all` of every verified version in the folder LORASB_TRITONS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, python

TRITONS = "LORASB_TRITONS"  # environment variable: a folder with one folder per version
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher needs a C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libcuda that records."""
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *flags, "-o", path, ROOT / "tests" / "support" / "recording_cuda.c"], check=True)
    return path


def compared(library: Path, *options: str, triton: Path | None = None, csrc: bool = True) -> dict[str, Any]:
    """What the comparison prints, in a process of its own; `csrc`: with the C++ extension, if it was built."""
    variables = {"TRITON_LIBCUDA_PATH": str(library.parent), "LORASB_NO_CSRC": "" if csrc else "1"}
    if triton is not None:
        variables |= {"PYTHONPATH": f"{triton}:{ROOT}", "TRITON_CACHE_DIR": str(library.parent / triton.name)}
    printed = python("-m", "tests.support.launch_arguments", library, *options, **variables)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.parametrize("csrc", [True, False])
def test_prepared_launches_pass_what_ordinary_ones_do(csrc: bool, library: Path) -> None:
    found = compared(library, csrc=csrc)
    assert csrc or not found["extension"]
    assert found["differences"] == []
    assert found["launches"] == 27


def test_a_wrong_argument_is_found(library: Path) -> None:
    found = compared(library, "--fault")
    assert len(found["differences"]) >= found["launches"]


def versions() -> list[Path]:
    folder = os.environ.get(TRITONS)
    return sorted(path for path in Path(folder).iterdir() if path.is_dir()) if folder else []


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("triton", versions(), ids=lambda path: path.name)
def test_with_every_verified_version(triton: Path, arch: str, library: Path) -> None:
    found = compared(library, "--arch", arch, triton=triton)
    assert found["triton"] == triton.name
    assert found["launches"] >= 20
    assert found["differences"] == []
