"""Imports run down the levels of the package, without cycles, and no forbidden call is made."""

import ast
from pathlib import Path

import pytest
from processes import ROOT, python

from docs import import_levels

MODULES = import_levels.files()
FILES = [*MODULES.values(), ROOT / "setup.py"]
WITHOUT = {  # module or package -> what it must not import, at any depth, so that importing it is cheap, or possible
    "lorasb.kernels": ("transformers", "peft"),
    "lorasb.kernels.plan": ("triton",),
    "lorasb.kernels.block_sizes": ("triton", "torch"),
    "lorasb.config": ("torch", "transformers"),
    "lorasb.constants": ("torch", "transformers", "peft", "triton"),
    "lorasb.utils.atomic_files": ("torch",),
    "lorasb.utils": ("transformers", "peft"),
    "lorasb.quantization": ("transformers", "peft", "bitsandbytes"),
    "lorasb.init": ("transformers",),
    "lorasb.app.settings": ("torch", "transformers", "peft"),
    "lorasb.app.cli": ("torch", "transformers", "peft"),
    "lorasb": ("benchmarks", "tests", "docs"),
}
CALLS = {"torch.load", "pickle.load", "pickle.loads", "exec", "eval", "os.system", "torch.save"}
USES_TRANSFORMERS = ("lorasb.tuner", "lorasb.export", "lorasb.training", "lorasb.serving.training", "lorasb.app")
GRAPH = import_levels.graph()


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_every_import_runs_down_and_no_files_import_each_other() -> None:
    assert import_levels.upward(GRAPH) == []
    assert import_levels.cycles(GRAPH) == []
    assert {import_levels.folder_of(name) for name in MODULES} == set(import_levels.LEVEL_OF)


def test_what_is_wrong_is_found() -> None:
    line = {"lorasb.layers.linear": {"lorasb.tuner.model": 7}, "lorasb.tuner.model": {"lorasb.layers.linear": 3}}
    assert import_levels.upward(line) == ["lorasb.layers.linear:7 (layers) imports lorasb.tuner.model (tuner)"]
    assert import_levels.cycles(line) == [["lorasb.layers.linear", "lorasb.tuner.model"]]
    beside = {"lorasb.export.lora": {"lorasb.init.sampling": 5}}
    assert len(import_levels.upward(beside)) == 1


def test_the_picture_is_of_these_imports() -> None:
    picture = (ROOT / "docs" / "import_levels.svg").read_text(encoding="utf-8")
    assert picture == import_levels.draw(GRAPH), "draw it again: python -m docs.import_levels"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_folder_says_what_lives_there(path: Path) -> None:
    assert len(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") > 60


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_forbidden_import_or_call(path: Path) -> None:
    tree, name = ast.parse(path.read_text(encoding="utf-8")), import_levels.module_name(path)
    for _, target in import_levels.imports(path, name):
        for importer, forbidden in WITHOUT.items():
            if under(name, importer):
                assert not any(under(target, other) for other in forbidden), f"{name} imports {target}"
        if under(target, "transformers"):
            assert any(under(name, allowed) for allowed in USES_TRANSFORMERS), f"{name} imports {target}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, f"{name}:{node.lineno} calls {ast.unparse(node.func)}"
        if isinstance(node, ast.Assert):
            raise AssertionError(f"{name}:{node.lineno} uses assert: raise an error with a message instead")


def test_public_functions_have_docstrings() -> None:
    """A method that overrides one with a docstring needs none."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def overrides(kind: ast.ClassDef, name: str) -> bool:
        bases = [classes[base.id] for base in kind.bases if isinstance(base, ast.Name) and base.id in classes]
        own = (node for base in bases for node in base.body if isinstance(node, ast.FunctionDef) and node.name == name)
        return any(ast.get_docstring(node) for node in own) or any(overrides(base, name) for base in bases)

    inherited = {
        node
        for kind in classes.values()
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and overrides(kind, node.name)
    }
    missing = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 3
                if ast.get_docstring(node) is None and not short and node not in inherited:
                    missing.append(f"{path.name}:{node.lineno} {node.name}")
    nested = ("call", "forward", "backward", "hook", "on_log", "Bar", "find_spec", "exec_module", "create_module")
    assert [name for name in missing if name.rpartition(" ")[2] not in nested] == []


def test_wheel_has_every_module(tmp_path: Path) -> None:
    code = "import setuptools; setuptools.setup = lambda **k: print(*k['packages'], k['package_dir'], k['package_data'], sep=';'); import runpy; runpy.run_path('setup.py')"
    found = python("-c", code).strip().split(";")
    wanted = {import_levels.module_name(path) for path in FILES if path.name == "__init__.py"}
    assert set(found[:-2]) == wanted | {"lorasb.kernels.tables", "lorasb.app.presets"}
    data = "{'lorasb': ['*.pyi'], 'lorasb.kernels.tables': ['*.json'], 'lorasb.app.presets': ['*.yaml']}"
    assert found[-2:] == ["{'lorasb.kernels': 'kernels/fused'}", data]
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a top-level `kernels` would hide another package"
