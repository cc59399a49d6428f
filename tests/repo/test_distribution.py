"""The wheel and the sdist work without the repository, built with a compiler or without one."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = "csrc", "lorasb", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"
NO_COMPILER = {"CC": "false", "CXX": "false"}


def _run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("environment", [{}, NO_COMPILER], ids=["compiler", "no compiler"])
def test_the_quick_start_runs_from_a_wheel(environment: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*SOURCE, "CHANGELOG.md", "CITATION.cff"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    # the sdist, and the wheel from what the sdist has
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    _run([sys.executable, "-m", "build", "--no-isolation"], source, PATH=path, **environment)
    (wheel,) = (source / "dist").glob("*.whl")
    compiled = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lorasb/_C")]
    assert bool(compiled) == (not environment)

    # requirements come from this environment, whose own lorasb a .pth file does not reach
    _run([sys.executable, "-m", "venv", "clean"], tmp_path)
    python = str(tmp_path / "clean" / "bin" / "python")
    _run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], tmp_path)
    packages = next((tmp_path / "clean" / "lib").glob("python*/site-packages"))
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()))

    shutil.rmtree(source)
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert block
    code = f"{block[1]}\nprint(lorasb.__file__)"
    printed = _run([python, "-W", "ignore", "-c", textwrap.dedent(code)], tmp_path)
    assert "The best city is Lisbon." in printed
    assert str(packages) in printed
    assert "finetune" in _run([python, "-m", "lorasb", "--help"], tmp_path)
