"""Importing lorasb is light, PEFT knows the method whatever is imported first, and 0.2.0's public API stays."""

import dataclasses
import inspect
import json
from operator import attrgetter

import pytest
from peft import PeftConfig
from processes import ROOT, python, run_each

import lorasb

KNOWN = (
    "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as M; from peft.utils.peft_types import PeftType; "
    "assert M[PeftType('LORASB')].__name__ == 'LoRASBConfig'"
)
ORDERS = (
    "import lorasb, peft",
    "import peft, lorasb",
    "import lorasb.layers.linear",
    "import lorasb.tuner",
    "import lorasb, importlib.util; importlib.util.find_spec('peft'); import peft",
    "import lorasb; lorasb.patch; lorasb.LoRASBConfig",
)
TRACE = (
    "import sys, lorasb, peft; print([type(f).__name__ for f in sys.meta_path], type(peft.__spec__.loader).__name__)"
)
NAMES = (
    "import lorasb\nfor name in lorasb.__all__: getattr(lorasb, name)\nassert set(lorasb.__all__) <= set(dir(lorasb))"
)
PATCH = "import lorasb, lorasb.app.finetune, lorasb.tuner\nfrom lorasb.tuner.model import patch\nassert callable(lorasb.patch)"
BACKEND = "import lorasb\nwith lorasb.backend('triton'): print(lorasb.ops.registry.current_backend())"


def test_import_is_light_touches_no_device_and_may_come_before_transformers() -> None:
    heavy = "('peft', 'transformers', 'triton', 'bitsandbytes', 'torch', 'matplotlib', 'rich', 'typer')"
    light = f"import sys, lorasb; print([m for m in {heavy} if m in sys.modules])"
    device = "import torch, lorasb.functional; print(torch.cuda.is_initialized())"
    assert python("-c", f"{light}\n{device}\nimport transformers, peft\n{KNOWN}").split() == ["[]", "False"]


def test_peft_knows_the_method_whatever_comes_first_and_the_hook_leaves_no_trace() -> None:
    """Also, every public name exists, and a backend may be chosen before anything else is imported."""
    *_, trace, backend = run_each([*(f"{order}\n{KNOWN}" for order in ORDERS), NAMES, PATCH, TRACE, BACKEND])
    assert trace
    assert "Peft" not in trace
    assert "Registering" not in trace
    assert backend == "triton"


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lorasb.nothing


@pytest.mark.long
def test_any_module_may_be_imported_first() -> None:
    """Whichever it is, PEFT's registration meets no partially imported module."""
    files = (p.relative_to(ROOT).with_suffix("") for p in sorted((ROOT / "lorasb").rglob("*.py")))
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files if file.stem != "__main__"]
    assert len(run_each([f"import {name}\n{KNOWN}" for name in modules])) > 100


# Name, or class and method -> parameters with their defaults; null if it has no signature.
RELEASED = json.loads((ROOT / "tests" / "data" / "public_api.json").read_text(encoding="utf-8"))
INHERITED = {field.name for field in dataclasses.fields(PeftConfig)}  # PEFT's fields come before LoRASBConfig's


def parameters(name: str) -> tuple[list[str], list[str]]:
    """All parameters of a public name with their defaults, and those that may be passed by position."""
    found = list(inspect.signature(attrgetter(name)(lorasb)).parameters.values())
    found = [one.replace(annotation=one.empty) for one in found if name != "LoRASBConfig" or one.name not in INHERITED]
    return [str(one) for one in found], [str(one) for one in found if one.kind <= one.POSITIONAL_OR_KEYWORD]


def test_no_public_name_is_gone() -> None:
    assert {name.partition(".")[0] for name in RELEASED} <= set(lorasb.__all__)


@pytest.mark.parametrize("name", [name for name, expected in RELEASED.items() if expected is not None])
def test_a_signature_takes_what_it_took(name: str) -> None:
    found, by_position = parameters(name)
    assert [one for one in found if one in RELEASED[name]] == RELEASED[name]
    # new parameters come after the known positional ones
    known = [one for one in by_position if one in RELEASED[name]]
    assert by_position[: len(known)] == known
