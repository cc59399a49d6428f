"""The levels of the package: `python -m docs.import_levels` draws docs/import_levels.svg from the actual imports.

Each level has one or more folders (modules outside the folders count to one of them). A file may import from its own
folder and from lower levels, at any depth of its code; never from a higher level or from another folder of its level.
Imports under `TYPE_CHECKING` count. `tests/repo/test_import_levels.py` checks this, and that no files import each other
in a cycle.
"""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx  # a requirement of torch

ROOT = Path(__file__).parents[1]
PACKAGE = "lorasb"
FACE = "lorasb/__init__"  # the public names, drawn as a folder
# from the top to the bottom
LEVELS: tuple[tuple[str, ...], ...] = (
    ("app",),
    (FACE,),
    ("training", "optim"),
    ("init", "export"),
    ("tuner",),
    ("serving", "vllm"),
    ("distributed",),
    ("layers",),
    ("functional",),
    ("backends",),
    ("config",),
    ("ops", "checkpoints"),
    ("kernels", "quantization"),
    ("compat", "utils"),
    ("constants",),
)
# modules outside the folders -> the folder they count to
FOLDER_OF_MODULE = {"__init__": FACE, "__main__": "app"}
EVERYWHERE = ("compat", "utils", "constants")  # imported from every level: their arrows are not drawn
LEVEL_OF = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}


def files() -> dict[str, Path]:
    """Module name -> file, of the whole package; `kernels/fused` is installed as `lorasb.kernels`."""
    paths = [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted((ROOT / "kernels" / "fused").rglob("*.py"))]
    return {module_name(path): path for path in paths}


def module_name(path: Path) -> str:
    """The dotted name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = (PACKAGE, "kernels", *parts[2:]) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """The top-level folder of a module, or the one that a module outside the folders counts to."""
    parts = module.split(".")
    folder = parts[1] if len(parts) > 1 else "__init__"
    return FOLDER_OF_MODULE.get(folder, folder)


def imports(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of all that a file imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def graph() -> dict[str, dict[str, int]]:
    """module -> module that it imports -> line."""
    known = files()
    edges: dict[str, dict[str, int]] = {name: {} for name in known}
    for name, path in known.items():
        for line, target in imports(path, name):
            # `from x import y`: y is a module of x, or a name in it
            module = target if target in known else target.rpartition(".")[0]
            if module in known and module != name:
                edges[name][module] = line
    return edges


def upward(edges: dict[str, dict[str, int]]) -> list[str]:
    """Imports of a higher level, or of another folder on the same level, as messages."""
    violations = []
    for name, targets in edges.items():
        for target, line in targets.items():
            source_folder, target_folder = folder_of(name), folder_of(target)
            if source_folder != target_folder and LEVEL_OF[source_folder] >= LEVEL_OF[target_folder]:
                violations.append(f"{name}:{line} ({source_folder}) imports {target} ({target_folder})")
    return violations


def cycles(edges: dict[str, dict[str, int]]) -> list[list[str]]:
    """Groups of files that import each other, without packages' `__init__`, which re-export their modules."""
    packages = {name for name, path in files().items() if path.name == "__init__.py"}
    pairs = [(name, target) for name, targets in edges.items() if name not in packages for target in targets]
    groups = networkx.strongly_connected_components(networkx.DiGraph(pairs))
    return sorted(sorted(group) for group in groups if len(group) > 1)


WIDTH, HEIGHT, GAP, BOX = 900, 50, 22, 190  # pixels: picture width, row height, gap between rows, folder width
FILLED = 'fill="#eef3fb" stroke="#34568b"'


def draw(edges: dict[str, dict[str, int]]) -> str:
    """The SVG: one row per level, one arrow per pair of folders, its width by the number of imports."""
    places = _places()
    total = 20 + len(LEVELS) * (HEIGHT + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{total}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    counts = Counter((folder_of(name), folder_of(target)) for name, targets in edges.items() for target in targets)
    for (source, target), count in sorted(counts.items()):
        if source != target and target not in EVERYWHERE:
            lines.append(_arrow(places[source], places[target], LEVEL_OF[target] - LEVEL_OF[source], count))
    for folder, place in places.items():
        lines.append(_box(folder, place, sum(folder_of(name) == folder for name in edges)))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _places() -> dict[str, tuple[float, int]]:
    """Where each folder's box is: the middle of its upper edge."""
    places = {}
    for level, folders in enumerate(LEVELS):
        for i, folder in enumerate(folders):
            x = WIDTH / 2 + (i - (len(folders) - 1) / 2) * (BOX + 60)
            places[folder] = x, 20 + level * (HEIGHT + GAP)
    return places


def _box(folder: str, place: tuple[float, int], size: int) -> str:
    """A folder's box, with its name and its number of files."""
    x, y = place
    label = f"{size} files" if size > 1 else "1 file"
    label += ", used from every level" if folder in EVERYWHERE else ""
    return (
        f'<rect x="{x - BOX / 2:.0f}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" {FILLED}/>'
        f'<text x="{x:.0f}" y="{y + 22}" text-anchor="middle" font-size="16">{folder}</text>'
        f'<text x="{x:.0f}" y="{y + 40}" text-anchor="middle" font-size="12" fill="#666">{label}</text>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], levels: int, count: int) -> str:
    """A line to the next level, or a curve around the folders between: left or right by the number of levels."""
    (x1, y1), (x2, y2) = start, end
    width = min(5.0, 0.8 + count / 8)
    style = f'fill="none" stroke="#34568b" stroke-opacity="0.35" stroke-width="{width:.1f}"'
    if levels == 1:
        return f'<path d="M{x1:.0f} {y1 + HEIGHT} L{x2:.0f} {y2}" {style}/>'
    side = 1 if levels % 2 else -1
    from_x, to_x = x1 + side * BOX / 2, x2 + side * BOX / 2
    bend = WIDTH / 2 + side * (BOX / 2 + 60 + 20 * levels)
    return (
        f'<path d="M{from_x:.0f} {y1 + 35} C{bend:.0f} {y1 + 35} {bend:.0f} {y2 + 15} {to_x:.0f} {y2 + 15}" {style}/>'
    )


def main() -> None:
    """Write the picture and print imports that break the rules; exits with 1 if there are any."""
    edges = graph()
    (ROOT / "docs" / "import_levels.svg").write_text(draw(edges), encoding="utf-8")
    violations = [*upward(edges), *(" <-> ".join(group) for group in cycles(edges))]
    print("\n".join(violations) or f"{len(edges)} files on {len(LEVELS)} levels: no import runs up, no cycle")
    raise SystemExit(bool(violations))


if __name__ == "__main__":
    main()
