"""Arrows between modules that must not exist, calls that must not be made, in the tree as it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "fused"  # installed as lorasb.kernels
FILES = [*sorted((ROOT / "lorasb").rglob("*.py")), *sorted(KERNELS.glob("*.py")), ROOT / "setup.py"]
ARROWS = {
    "lorasb.kernels": ["lorasb", "transformers", "peft"],
    "lorasb.kernels.plan": ["triton"],
    "lorasb.kernels.block_sizes": ["triton", "torch"],
    "lorasb.layers.linear_group": [
        "lorasb.layers.linear",
        "lorasb.tuner",
        "lorasb.patch",
        "lorasb.init",
        "lorasb.kernels",
    ],
    "lorasb.ops.linear_group": ["lorasb.backends", "lorasb.functional", "lorasb.layers.linear", "lorasb.kernels"],
    "lorasb.ops.registry": [
        "lorasb.backends",
        "lorasb.kernels",
        "lorasb.functional",
        "lorasb.layers.linear",
        "lorasb.tuner",
        "lorasb.patch",
    ],
    "lorasb.backends": ["lorasb.layers.linear", "lorasb.tuner", "lorasb.patch", "lorasb.init", "lorasb.functional"],
    "lorasb.functional": ["lorasb.layers.linear", "lorasb.tuner", "lorasb.patch", "lorasb.init"],
    "lorasb.layers.linear": ["lorasb.patch", "lorasb.tuner", "lorasb.init", "transformers"],
    "lorasb.utils.bit_packing": ["lorasb"],
    "lorasb.ops.weight_gradient": [
        "lorasb.backends",
        "lorasb.functional",
        "lorasb.layers.linear",
        "lorasb.init",
        "lorasb.kernels",
    ],
    "lorasb.training.init_callback": ["lorasb.patch", "lorasb.tuner", "lorasb.cli"],
    "lorasb.init": ["lorasb.training.init_callback", "lorasb.patch", "lorasb.tuner", "lorasb.cli", "transformers"],
    "lorasb.tuner.config": ["torch", "transformers", "lorasb.layers.linear", "lorasb.tuner"],
    "lorasb.utils.atomic_files": ["torch", "lorasb"],
    "lorasb.utils.precision": ["lorasb", "transformers", "peft"],
    "lorasb.recipes.settings": ["torch", "transformers", "peft"],
    "lorasb.cli.options": ["torch", "transformers", "peft"],
    "lorasb": ["benchmarks", "tests"],
}
TYPE_ONLY = {
    "lorasb.layers.linear_group": "lorasb.layers.linear.LoRASBLinear"
}  # imported for annotations, never at run time
CALLS = {"torch.load", "pickle.load", "pickle.loads", "exec", "eval", "os.system", "torch.save"}
USES_TRANSFORMERS = (
    "lorasb.layers.unfused_experts",
    "lorasb.tuner",
    "lorasb.patch",
    "lorasb.training.init_callback",
    "lorasb.cli",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("lorasb", *(part for part in parts if part != "fused")) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    package = module_name(path).split(".") + (["x"] if path.name == "__init__.py" else [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level], node.module or ""]) if node.level else node.module
            yield from (f"{(base or '').rstrip('.')}.{alias.name}" for alias in node.names)


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_forbidden_arrow_or_call(path: Path) -> None:
    tree, name = ast.parse(path.read_text(encoding="utf-8")), module_name(path)
    for target in imports(path, tree):
        for importer, forbidden in ARROWS.items():
            inner = importer in ("lorasb.utils.atomic_files", "lorasb.kernels", "lorasb.utils.precision") and under(
                target, importer
            )
            inner = inner or (TYPE_ONLY.get(name) == target)
            if under(name, importer) and not inner:
                assert not any(under(target, other) for other in forbidden), f"{name} imports {target}"
        if under(target, "transformers"):
            assert any(under(name, allowed) for allowed in USES_TRANSFORMERS), f"{name} imports {target}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, f"{name}:{node.lineno} calls {ast.unparse(node.func)}"
        if isinstance(node, ast.Assert):
            raise AssertionError(f"{name}:{node.lineno} asserts: user input meets errors with a message")


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 3
                if ast.get_docstring(node) is None and not short:
                    missing.append(f"{path.name}:{node.lineno} {node.name}")
    nested = ("call", "forward", "backward", "hook", "on_log", "Bar", "find_spec", "exec_module", "create_module")
    assert [name for name in missing if name.rpartition(" ")[2] not in nested] == []


def test_wheel_has_every_module(tmp_path: Path) -> None:
    code = "import setuptools; setuptools.setup = lambda **k: print(*k['packages'], k['package_dir'], k['package_data'], sep=';'); import runpy; runpy.run_path('setup.py')"
    found = (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        .stdout.strip()
        .split(";")
    )
    wanted = {module_name(path) for path in FILES if path.name == "__init__.py"}
    assert set(found[:-2]) == wanted | {"lorasb.kernels.tables"}
    assert found[-2:] == ["{'lorasb.kernels': 'kernels/fused'}", "{'lorasb.kernels.tables': ['*.json']}"]
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a top-level `kernels` would hide another package"
