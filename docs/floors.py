"""The floors of the package: `python -m docs.floors` draws docs/floors.svg from the imports as they are.

Every import, at any depth, runs down: a file uses its own room and the floors below, never one above or beside. Imports
under `TYPE_CHECKING` are not followed. `tests/repo/test_floors.py` holds both rules, and that no files import each
other in a cycle.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "lorasb"
FACE = "lorasb/__init__"
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("recipes",),
    (FACE,),
    ("training",),
    ("init", "export"),
    ("tuner",),
    ("distributed",),
    ("layers",),
    ("functional",),
    ("backends",),
    ("ops", "checkpoints"),
    ("kernels", "quantization"),
    ("utils",),
    ("constants",),
)
BESIDE = {"__init__": FACE, "_peft_registration": FACE, "__main__": "cli", "_version": "constants"}
EVERYWHERE = ("utils", "constants")  # their lines would hide the others
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by name; `kernels/fused` is installed as `lorasb.kernels`."""
    paths = [*sorted((root / PACKAGE).rglob("*.py")), *sorted((root / "kernels" / "fused").rglob("*.py"))]
    return {module_name(path, root): path for path in paths}


def module_name(path: Path, root: Path = ROOT) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = (PACKAGE, "kernels", *parts[2:]) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module: a folder of the package, or a file beside the folders."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else "__init__"
    return BESIDE.get(room, room)


def imports(path: Path, name: str, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of everything of the package that a file imports, at any depth, `TYPE_CHECKING` apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = {id(inner) for node in ast.walk(tree) if _is_typing_block(node) for inner in _body(node)}
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            targets = [f"{(base or '').rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            module = target if target in known else target.rpartition(".")[0]
            if module in known and module != name:
                yield node.lineno, module


def _is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _body(node: ast.AST) -> Iterator[ast.AST]:
    for statement in getattr(node, "body", ()):
        yield from ast.walk(statement)


def graph(root: Path = ROOT) -> dict[str, dict[str, int]]:
    """module -> module that it imports -> line."""
    known = files(root)
    return {name: {m: line for line, m in imports(path, name, known)} for name, path in known.items()}


def upward(edges: dict[str, dict[str, int]]) -> list[str]:
    """Imports that run up, or to another room of the same floor."""
    wrong = []
    for name, targets in edges.items():
        for target, line in targets.items():
            here, there = room_of(name), room_of(target)
            if here != there and LEVEL[here] >= LEVEL[there]:
                wrong.append(f"{name}:{line} ({here}) imports {target} ({there})")
    return wrong


def cycles(edges: dict[str, dict[str, int]]) -> list[list[str]]:
    """Groups of files that import each other. A package's `__init__`, which gathers its modules, is no member."""
    known = files()
    ahead = {name: set() if known[name].name == "__init__.py" else set(targets) for name, targets in edges.items()}
    reach = {name: _reachable(name, ahead) for name in ahead}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in ahead if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(start: str, ahead: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for module in ahead.get(todo.pop(), ()):
            if module not in seen:
                seen.add(module)
                todo.append(module)
    return seen


def room_edges(edges: dict[str, dict[str, int]]) -> dict[tuple[str, str], int]:
    """(room, room below) -> number of imports between their files."""
    counts: dict[tuple[str, str], int] = {}
    for name, targets in edges.items():
        for target in targets:
            pair = room_of(name), room_of(target)
            if pair[0] != pair[1]:
                counts[pair] = counts.get(pair, 0) + 1
    return counts


WIDTH, HEIGHT, GAP, BOX = 900, 50, 22, 190
FILLED = 'fill="#eef3fb" stroke="#34568b"'


def draw(edges: dict[str, dict[str, int]]) -> str:
    """An SVG: a row a floor, an arrow for each pair of rooms, its width by the number of imports."""
    sizes = {room: sum(room_of(name) == room for name in edges) for room in LEVEL}
    places = {}
    for level, rooms in enumerate(FLOORS):
        for i, room in enumerate(rooms):
            x = WIDTH / 2 + (i - (len(rooms) - 1) / 2) * (BOX + 60)
            places[room] = x, 20 + level * (HEIGHT + GAP)
    total = 20 + len(FLOORS) * (HEIGHT + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{total}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for (source, target), count in sorted(room_edges(edges).items()):
        if target in EVERYWHERE:
            continue
        lines.append(_arrow(places[source], places[target], LEVEL[target] - LEVEL[source], count))
    for room, (x, y) in places.items():
        many = f"{sizes[room]} files" if sizes[room] > 1 else "1 file"
        many += ", used from every floor" if room in EVERYWHERE else ""
        lines.append(
            f'<rect x="{x - BOX / 2:.0f}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" {FILLED}/>'
            f'<text x="{x:.0f}" y="{y + 22}" text-anchor="middle" font-size="16">{room}</text>'
            f'<text x="{x:.0f}" y="{y + 40}" text-anchor="middle" font-size="12" fill="#666">{many}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _arrow(start: tuple[float, float], end: tuple[float, float], floors: int, count: int) -> str:
    """Straight to the next floor; round the side to those further down, alternately left and right."""
    (x1, y1), (x2, y2) = start, end
    thick = min(5.0, 0.8 + count / 8)
    style = f'fill="none" stroke="#34568b" stroke-opacity="0.35" stroke-width="{thick:.1f}"'
    if floors == 1:
        return f'<path d="M{x1:.0f} {y1 + HEIGHT} L{x2:.0f} {y2}" {style}/>'
    side = 1 if floors % 2 else -1
    from_x, to_x = x1 + side * BOX / 2, x2 + side * BOX / 2
    bend = WIDTH / 2 + side * (BOX / 2 + 60 + 20 * floors)
    return (
        f'<path d="M{from_x:.0f} {y1 + 35} C{bend:.0f} {y1 + 35} {bend:.0f} {y2 + 15} {to_x:.0f} {y2 + 15}" {style}/>'
    )


def main() -> None:
    """Write the picture; name what is wrong with the imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "floors.svg")
    options = parser.parse_args()
    edges = graph()
    options.output.write_text(draw(edges), encoding="utf-8")
    wrong = [*upward(edges), *(" <-> ".join(group) for group in cycles(edges))]
    print("\n".join(wrong) or f"{len(edges)} files on {len(FLOORS)} floors: no import runs up, no cycle")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
