"""The import graph of the two packages, measured: `make house`, or `python -m bench.house --rev REV` to compare.

A *room* is a file or a folder at the top of `pipeline/` or `consumers/`. The *floors* are the `layers` contracts of the
tree's own `pyproject.toml`, which `lint-imports` enforces; this command counts what it enforces, and also finds what it
does not look at: a room that stands on no floor, a circle inside a room, a class name that two modules define.

The exit code is 1 if an import of this tree runs up, if there is a circle, a room without a floor or a class name with
more than one owner.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grimp

from bench.revision import ROOT, revision

PACKAGES = ("pipeline", "consumers")
LONG_FUNCTION, LONG_MODULE = 40, 400  # lines

Import = tuple[str, str]
"""Two modules: the first imports the second."""


@dataclass(frozen=True)
class House:
    """What one tree looks like."""

    rooms: dict[str, int]
    """Lines of code in each room, the top floor first."""
    doors: dict[str, set[str]]
    """Which rooms each room imports from."""
    crossing: int
    """Imports between modules of different rooms."""
    floors: int
    """How many floors the contracts declare; 0 for a tree without such contracts."""
    up: list[Import]
    """Imports against the order of the floors. Without floors: the fewest that are in the way of any such order."""
    circles: list[tuple[str, ...]]
    """Modules that import each other round about, and packages inside one package that do."""
    homeless: list[str]
    """Rooms that stand on no floor."""
    owners: dict[str, list[str]]
    """The modules that define a class name, for each name with more than one."""
    modules: int
    long_modules: list[str]
    long_functions: list[str]

    @property
    def faults(self) -> list[str]:
        """What may not be, each in one line."""
        return [
            *(f"{importer} imports {imported}, which is above it or beside it" for importer, imported in self.up),
            *(f"circle: {', '.join(circle)}" for circle in self.circles),
            *(f"{room} is on no floor: add it to the layers contract in pyproject.toml" for room in self.homeless),
            *(f"class {name} is defined in {', '.join(where)}" for name, where in self.owners.items()),
        ]


def measure(root: Path = ROOT) -> House:
    """The house in a folder that holds both packages and their `pyproject.toml`.

    Raises:
        ValueError: This process has already imported packages of these names from another folder.
    """
    graph = _graph(root)
    trees = {name: _Source.of(path) for name, path in _files(root).items()}
    imports = [
        (importer, imported)
        for importer in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(importer))
    ]
    contracts = _layers(root)
    between = [(a, b) for a, b in imports if _room(a) != _room(b) and "." in a and "." in b]
    doors: dict[str, set[str]] = defaultdict(set)
    for importer, imported in between:
        doors[_room(importer)].add(_room(imported))
    rooms: dict[str, int] = defaultdict(int)
    for name, source in trees.items():
        if "." in name:
            rooms[_room(name)] += source.lines
    placed = [layer for contract in contracts for floor in contract for layer in floor]
    order = {room: number for number, room in enumerate(placed)}
    return House(
        rooms=dict(sorted(rooms.items(), key=lambda room: (order.get(room[0], len(order)), room[0]))),
        doors=doors,
        crossing=len(between),
        floors=sum(len(contract) for contract in contracts),
        up=_running_up(imports, contracts) if contracts else _in_the_way(graph),
        circles=_circles(imports),
        homeless=sorted(set(rooms) - set(placed)) if contracts else [],
        owners=_shared_names(trees),
        modules=len(trees),
        long_modules=sorted(name for name, source in trees.items() if source.lines > LONG_MODULE),
        long_functions=sorted(f"{name}.{function}" for name, source in trees.items() for function in source.long),
    )


def _graph(root: Path) -> grimp.ImportGraph:
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        for package in PACKAGES:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None or root.resolve() not in Path(spec.origin).resolve().parents:
                raise ValueError(f"{package} is imported from {spec and spec.origin}, not from {root}")
        return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    finally:
        sys.path.remove(str(root))


def _files(root: Path) -> dict[str, Path]:
    """Every module's file, by the module's name."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _layers(root: Path) -> list[list[list[str]]]:
    """The `layers` contracts of a tree: for each its floors, the top one first, and the modules on each floor."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    return [
        [[one.strip() for one in floor.replace(":", "|").split("|")] for floor in contract["layers"]]
        for contract in contracts
        if contract["type"] == "layers"
    ]


def _running_up(imports: list[Import], contracts: list[list[list[str]]]) -> list[Import]:
    """The imports that go to a higher floor of a contract, or to another room of the same floor."""
    up = set()
    for floors in contracts:
        height = {layer: -number for number, floor in enumerate(floors) for layer in floor}
        for importer, imported in imports:
            here, there = _layer_of(importer, height), _layer_of(imported, height)
            if here is not None and there is not None and here != there and height[there] >= height[here]:
                up.add((importer, imported))
    return sorted(up)


def _layer_of(module: str, layers: Mapping[str, int]) -> str | None:
    """The most particular layer that a module belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in layers), None)


def _in_the_way(graph: grimp.ImportGraph) -> list[Import]:
    """The fewest imports without which the rooms of each package could stand in some order, as far as one can tell."""
    return sorted(one for package in PACKAGES for one in graph.nominate_cycle_breakers(package))


def _circles(imports: list[Import]) -> list[tuple[str, ...]]:
    """Circles among modules, and among what stands side by side in one package."""
    graphs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for importer, imported in imports:
        graphs["modules"][importer].add(imported)
        for package, here, there in _siblings(importer, imported):
            graphs[package][here].add(there)
    return sorted({tuple(circle) for graph in graphs.values() for circle in _strong(graph)})


def _siblings(importer: str, imported: str) -> Iterator[tuple[str, str, str]]:
    """The package in which an import leads from one child to another, and the two children."""
    ours, theirs = importer.split("."), imported.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if shared is not None:
        package = ".".join(ours[:shared])
        yield package, ".".join(ours[: shared + 1]), ".".join(theirs[: shared + 1])


def _strong(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """The strongly connected components of more than one node."""
    reach = {node: _reachable(graph, node) for node in graph}
    left = set(graph)
    while left:
        node = left.pop()
        circle = {other for other in reach[node] if node in reach.get(other, ())}
        left -= circle
        if len(circle) > 1:
            yield sorted(circle)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    to_visit = [start]
    while to_visit:
        for node in graph.get(to_visit.pop(), set()) - found:
            found.add(node)
            to_visit.append(node)
    return found


@dataclass(frozen=True)
class _Source:
    """What one file defines."""

    lines: int
    classes: frozenset[str]
    long: tuple[str, ...]
    """Functions of more than `LONG_FUNCTION` lines, docstring and decorators included."""

    @classmethod
    def of(cls, path: Path) -> _Source:
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        return cls(
            lines=text.count("\n"),
            classes=frozenset(node.name for node in nodes if isinstance(node, ast.ClassDef)),
            long=tuple(
                node.name
                for node in nodes
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (node.end_lineno or node.lineno) - node.lineno >= LONG_FUNCTION
            ),
        )


def _shared_names(trees: Mapping[str, _Source]) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = defaultdict(list)
    for name, source in sorted(trees.items()):
        for one in source.classes:
            owners[one].append(name)
    return {name: where for name, where in sorted(owners.items()) if len(where) > 1}


def _figures(house: House) -> dict[str, str]:
    up = str(len(house.up)) if house.floors else f"{len(house.up)} at least (no floors declared)"
    return {
        "files and folders at the top": str(len(house.rooms)),
        "modules": str(house.modules),
        "imports between rooms, as pairs of rooms": str(sum(map(len, house.doors.values()))),
        "imports between rooms, as pairs of modules": str(house.crossing),
        "imports that run up": up,
        "circles": str(len(house.circles)),
        "rooms on no floor": str(len(house.homeless)) if house.floors else "all",
        "class names with more than one owner": str(len(house.owners)),
        f"modules over {LONG_MODULE} lines": str(len(house.long_modules)),
        f"functions over {LONG_FUNCTION} lines": str(len(house.long_functions)),
    }


def _print_plan(house: House) -> None:
    print("\nThe rooms, the top floor first, and what each imports from:\n")
    for room, lines in house.rooms.items():
        print(f"  {room:24} {lines:6} lines   {', '.join(sorted(house.doors.get(room, ()))) or '-'}")


def main() -> int:
    """Returns 1 where this tree has a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.house", description="The import graph, measured.")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="measure the tree in DIR")
    parser.add_argument("--rev", metavar="REV", help="measure the tree of this commit too, and print both side by side")
    options = parser.parse_args()
    columns = {}
    if options.rev:
        with revision(options.rev) as before:
            columns[options.rev] = _figures(measure(before))
    house = measure(options.root)
    columns["this tree"] = _figures(house)
    print(f"{'':44}" + "".join(f"{name:34}" for name in columns).rstrip())
    for what in columns["this tree"]:
        print(f"{what:44}" + "".join(f"{column[what]:34}" for column in columns.values()).rstrip())
    _print_plan(house)
    if house.faults:
        print("\n" + "\n".join(house.faults))
    return int(bool(house.faults))


if __name__ == "__main__":
    sys.exit(main())
