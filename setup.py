"""Packages and where they lie, and the C++ extension; everything else is in pyproject.toml.

The extension is built against the torch that is installed, so build without isolation. Without a compiler or torch, or
with LORASB_NO_CSRC=1, lorasb is installed without it and computes in eager torch.
"""

import os
import platform
import shutil
from pathlib import Path

from setuptools import find_packages, setup

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))


def extension():
    """Keyword arguments for `setup`: the extension and how it is built, or nothing."""
    if os.environ.get("LORASB_NO_CSRC") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"lorasb: built without its C++ extension ({error}); eager torch computes instead")
        return {}

    class BuildOrLeaveOut(BuildExtension):
        """A build that fails costs speed, not the installation."""

        def run(self):
            """Build, or say why not."""
            try:
                super().run()
            except Exception as error:
                print(f"lorasb: built without its C++ extension ({error}); eager torch computes instead")
                self.extensions = []

    flags = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    flags += os.environ.get("LORASB_CXXFLAGS", "").split()
    # Compiled with OpenMP and not linked with it: the functions are found in the runtime that torch has loaded, so that
    # there is one pool of threads, torch's.
    threads = ["-fopenmp"] if platform.system() == "Linux" else []
    module = CppExtension(
        "lorasb._C",
        SOURCES,
        include_dirs=[str(Path("csrc").absolute())],
        extra_compile_args={"cxx": flags + threads},
        extra_link_args=os.environ.get("LORASB_LDFLAGS", "").split(),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    )
    parallel = shutil.which("ninja") is not None  # the files side by side; torch warns where it looks for ninja in vain
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildOrLeaveOut.with_options(use_ninja=parallel)}}


# lorasb/py.typed needs no line below: setuptools puts it into the wheel by itself.
setup(
    packages=[*find_packages(include=["lorasb", "lorasb.*"]), "lorasb.kernels", "lorasb.kernels.tables"],
    package_dir={"lorasb.kernels": "kernels/fused"},
    package_data={"lorasb.kernels.tables": ["*.json"]},
    **extension(),
)
