"""The wheel and the sdist work without the repository, built with a compiler or without one."""

import os
import re
import runpy
import shutil
import site
import sys
import zipfile
from pathlib import Path

import pytest
from processes import ROOT
from processes import python as run_python

SOURCE = "csrc", "lorasb", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"
NO_COMPILER = {"CC": "false", "CXX": "false"}


def test_links_and_pictures_of_the_readme_are_absolute_on_pypi(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    monkeypatch.setenv("LORASB_NO_CSRC", "1")
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    text = given["long_description"]
    assert all(link.startswith("https://") for link in re.findall(r'(?:\]\(|src="|srcset=")([^)"#\s]+)', text))
    found = re.findall(r'lorasb/lorasb/(raw|blob)/main/([^)"#\s]+)', text)
    assert {kind for kind, _ in found} == {"raw", "blob"}
    for kind, path in found:
        assert (ROOT / path).exists(), path
        assert (kind == "raw") == path.endswith(".png"), path


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
    # build the sdist, and the wheel from the sdist
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run_python("-m", "build", "--no-isolation", cwd=source, PATH=path, **environment)
    (wheel,) = (source / "dist").glob("*.whl")
    compiled = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lorasb/_C")]
    assert bool(compiled) == (not environment)
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    assert b"lorasb/raw/main/docs/" in zipfile.ZipFile(wheel).read(metadata)

    # requirements come from this environment; its own lorasb is not reachable through a .pth file
    run_python("-m", "venv", "clean", cwd=tmp_path)
    python = str(tmp_path / "clean" / "bin" / "python")
    run_python("-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path, program=python)
    packages = next((tmp_path / "clean" / "lib").glob("python*/site-packages"))
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()))

    shutil.rmtree(source)
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert block
    code = f"{block[1]}\nprint(lorasb.__file__)"
    printed = run_python("-W", "ignore", "-c", code, cwd=tmp_path, program=python)
    assert "The best city is Lisbon." in printed
    assert str(packages) in printed
    assert "finetune" in run_python("-m", "lorasb", "--help", cwd=tmp_path, program=python)
