"""Package folders, the readme and the C++ extension; everything else is in pyproject.toml.

The extension is built against the installed torch, so build without isolation. Without a compiler or torch, or with
LORASB_NO_CSRC=1, lorasb is installed without it and computes in eager torch.
"""

import os
import platform
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))


def extension():
    """Keyword arguments of `setup` that build the extension; empty where it cannot be built."""
    if os.environ.get("LORASB_NO_CSRC") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"lorasb: built without its C++ extension ({error}); eager torch computes instead")
        return {}

    class BuildOrLeaveOut(BuildExtension):
        """Installs lorasb without the extension if compiling it fails: that costs speed only."""

        def run(self):
            """Build, or print why that failed."""
            try:
                super().run()
            except Exception as error:
                print(f"lorasb: built without its C++ extension ({error}); eager torch computes instead")
                self.extensions = []  # or setuptools would look for the file to install

    # -ffp-contract=off: with fused multiply-adds, dequantized values would not be bit-equal to bitsandbytes'
    flags = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    flags += os.environ.get("LORASB_CXXFLAGS", "").split()
    # Compiled with OpenMP but not linked to it: symbols resolve to the runtime that torch has loaded, so that there is
    # one thread pool, torch's.
    threads = ["-fopenmp"] if platform.system() == "Linux" else []
    module = CppExtension(
        "lorasb._C",
        SOURCES,
        include_dirs=[str(Path("csrc").absolute())],
        extra_compile_args={"cxx": flags + threads},
        extra_link_args=os.environ.get("LORASB_LDFLAGS", "").split(),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    )
    parallel = shutil.which("ninja") is not None  # compiles files in parallel; torch warns if use_ninja finds none
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildOrLeaveOut.with_options(use_ninja=parallel)}}


def description():
    """The README with absolute links and pictures, as relative ones lead nowhere on PyPI."""
    text, main = Path("README.md").read_text(encoding="utf-8"), "https://github.com/lorasb/lorasb/{}/main/"
    text = re.sub(r'(!\[[^]]*\]\(|src(?:set)?=")(?!https?:)', rf"\1{main.format('raw')}", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{main.format('blob')}", text)


# lorasb/py.typed needs no line below: setuptools puts it into the wheel by itself. `__init__.pyi` is read at runtime.
setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["lorasb", "lorasb.*"]),
        "lorasb.kernels",
        "lorasb.kernels.tables",
        "lorasb.app.presets",
    ],
    # kernels/ is at the top level of the repository and installed as lorasb.kernels
    package_dir={"lorasb.kernels": "kernels/fused"},
    package_data={"lorasb": ["*.pyi"], "lorasb.kernels.tables": ["*.json"], "lorasb.app.presets": ["*.yaml"]},
    **extension(),
)
