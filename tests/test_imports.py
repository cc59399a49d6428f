"""`import lorasb` is light, and PEFT knows the method whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KNOWN = (
    "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as M; from peft.utils.peft_types import PeftType; "
    "assert M[PeftType('LORASB')].__name__ == 'LoRASBConfig'"
)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = "('peft', 'transformers', 'triton', 'bitsandbytes', 'torch', 'matplotlib', 'rich', 'typer')"
    assert python(f"import sys, lorasb; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_import_touches_no_device() -> None:
    assert python("import torch, lorasb, lorasb.functional; print(torch.cuda.is_initialized())") == "False"


@pytest.mark.parametrize(
    "order",
    [
        "import lorasb, peft",
        "import peft, lorasb",
        "import lorasb.config",
        "import lorasb.linear",
        "import lorasb.tuner",
        "import lorasb.init",
        "import lorasb.cli.finetune",
        "import lorasb, importlib.util; importlib.util.find_spec('peft'); import peft",
        "import lorasb, transformers, peft",
        "import lorasb; lorasb.patch; lorasb.LoRASBConfig",
    ],
)
def test_peft_knows_the_method(order: str) -> None:
    python(f"{order}\n{KNOWN}")


def test_the_hook_leaves_no_trace() -> None:
    code = "import sys, lorasb, peft; print([type(f).__name__ for f in sys.meta_path], type(peft.__spec__.loader).__name__)"
    printed = python(code)
    assert "Peft" not in printed
    assert "Registering" not in printed


def test_every_public_name_is_there() -> None:
    python(
        "import lorasb\nfor name in lorasb.__all__: getattr(lorasb, name)\nassert set(lorasb.__all__) <= set(dir(lorasb))"
    )


def test_patch_stays_a_function_whatever_is_imported() -> None:
    python(
        "import lorasb, lorasb.cli.finetune, lorasb.tuner\nfrom lorasb.patch import patch\nassert callable(lorasb.patch)"
    )


def test_unknown_names_raise() -> None:
    import lorasb

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lorasb.nothing


def test_a_backend_may_be_chosen_before_anything_else_is_imported() -> None:
    code = "import lorasb\nwith lorasb.backend('triton'): print(lorasb.ops.current_backend())"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "triton", done.stderr[-500:]
