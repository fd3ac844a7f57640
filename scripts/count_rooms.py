"""Lines of each package (here called a room), imports between them, and import cycles: now, and at an earlier commit.

    python scripts/count_rooms.py                      # a table
    python scripts/count_rooms.py --json               # one JSON document
    python scripts/count_rooms.py --before COMMIT      # 4e3f1a1 by default, if the repository has it

A room is a folder with code, directly in the repository (`kernels`) or in `bimedix_jax/` (`bimedix_jax/data`), or a
module at the top of `bimedix_jax/`. An arrow leads from a room to another room that it imports. Imports are read from
syntax trees, so those inside functions and under TYPE_CHECKING count too. A cycle is a set of modules, or of rooms,
each of which reaches all the others through imports.
"""

import argparse
import ast
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "models", "bimedix_jax", "experiments", "scripts")
BEFORE = "4e3f1a1"

Sources = Mapping[str, str]
"""Text by path, relative to the repository."""
Graph = dict[str, set[str]]


def is_source(path: str) -> bool:
    """Whether a path is a Python file of a layer; the symlinks bimedix_jax/{kernels,models} would count files twice."""
    parts = path.split("/")
    linked = parts[0] == "bimedix_jax" and parts[1] in ("kernels", "models")
    return path.endswith(".py") and len(parts) > 1 and parts[0] in LAYERS and not linked


def working_tree() -> dict[str, str]:
    found = (path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py")))
    named = {path.relative_to(ROOT).as_posix(): path for path in found}
    return {name: path.read_text("utf-8") for name, path in named.items() if is_source(name)}


def git(*words: str, text: str = "") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *words], cwd=ROOT, input=text.encode(), capture_output=True, check=False)


def commit_tree(commit: str) -> dict[str, str] | None:
    """The sources at a commit; None where the repository does not have it, as in a shallow clone."""
    listed = git("ls-tree", "-r", "--name-only", commit)
    if listed.returncode:
        return None
    paths = [path for path in listed.stdout.decode().splitlines() if is_source(path)]
    blobs, start, sources = git("cat-file", "--batch", text="".join(f"{commit}:{p}\n" for p in paths)).stdout, 0, {}
    for path in paths:  # each blob: `<id> blob <size>`, its bytes, a line feed
        header_end = blobs.index(b"\n", start)
        size = int(blobs[start:header_end].split()[2])
        sources[path] = blobs[header_end + 1 : header_end + 1 + size].decode()
        start = header_end + size + 2
    return sources


def module_name(path: str) -> str:
    """The name a file is imported by: kernels/ and models/ install below bimedix_jax."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] in ("kernels", "models"):
        parts = ["bimedix_jax", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "bimedix_jax" else parts[0]


def imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Modules of the project that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules:
                    yield inner
                elif node.module in modules:
                    yield node.module


def import_graph(sources: Sources) -> Graph:
    """Modules that each module imports, itself left out."""
    names = {module_name(path): path for path in sources}
    return {name: set(imported(ast.parse(sources[path]), set(names))) - {name} for name, path in sorted(names.items())}


def room_graph(sources: Sources, modules: Graph) -> Graph:
    """Rooms that each room imports, itself left out."""
    room_of = {module_name(path): room(path) for path in sources}
    graph: Graph = {name: set() for name in sorted(set(room_of.values()))}
    for module, targets in modules.items():
        graph[room_of[module]] |= {room_of[target] for target in targets} - {room_of[module]}
    return graph


def cycles(graph: Graph) -> list[list[str]]:
    """Sets of two or more nodes that all reach each other, sorted."""
    reached = {}
    for start in graph:
        seen, waiting = set(), [*graph[start]]
        while waiting:
            if (node := waiting.pop()) not in seen:
                seen.add(node)
                waiting += graph[node]
        reached[start] = seen
    found = {tuple(sorted(n for n in graph if n in reached[s] and s in reached[n])) for s in graph}
    return sorted([*group] for group in found if len(group) > 1)


def functions_named(sources: Sources, name: str) -> list[str]:
    """`path:line` of each function or method of a name."""
    return [
        f"{path}:{node.lineno}"
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]


def public_classes(sources: Sources) -> dict[str, list[str]]:
    """Paths that define a public class at their top, by its name."""
    found: dict[str, list[str]] = {}
    for path, text in sources.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path)
    return found


def count(sources: Sources) -> dict[str, Any]:
    """What the JSON document holds for one tree."""
    modules = import_graph(sources)
    rooms = room_graph(sources, modules)
    lines = dict.fromkeys(rooms, 0)
    for path, text in sources.items():
        lines[room(path)] += len(text.splitlines())
    tops = [path for path in sources if path.startswith("bimedix_jax/") and path.count("/") == 1]
    return {
        "lines": lines,
        "total_lines": sum(lines.values()),
        "rooms": len(rooms),
        "arrows": sum(len(targets) for targets in rooms.values()),
        "room_cycles": cycles(rooms),
        "module_cycles": cycles(modules),
        "top_level_modules": len(tops),
        "functions_named_run": len(functions_named(sources, "run")),
        "classes_of_one_name": sorted(name for name, paths in public_classes(sources).items() if len(paths) > 1),
    }


def table(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """Both counts side by side, folders of code first."""
    old = before or {}
    names = sorted({*now["lines"], *old.get("lines", {})}, key=lambda name: (name.endswith(".py"), name))
    rows = [(name, old.get("lines", {}).get(name, "-"), now["lines"].get(name, "-")) for name in names]
    facts = ("total_lines", "rooms", "arrows", "top_level_modules", "functions_named_run")
    rows += [(fact.replace("_", " "), old.get(fact, "-"), now[fact]) for fact in facts]
    rows += [
        (kind.replace("_", " "), len(old[kind]) if old else "-", len(now[kind]))
        for kind in ("room_cycles", "module_cycles", "classes_of_one_name")
    ]
    lines = [f"{'lines by room':32} {'before':>8} {'now':>8}"]
    lines += [f"{name:32} {was!s:>8} {is_now!s:>8}" for name, was, is_now in rows]
    lines += [f"cycle: {' <-> '.join(cycle)}" for kind in ("room_cycles", "module_cycles") for cycle in now[kind]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)
    earlier = commit_tree(options.before)
    if earlier is None and options.before != BEFORE:
        raise SystemExit(f"error: the repository has no commit {options.before}; name another, or fetch it.")
    before, now = None if earlier is None else count(earlier), count(working_tree())
    if options.json:
        print(json.dumps({"commit_before": options.before if before else None, "before": before, "now": now}, indent=2))
    else:
        print(table(before, now))


if __name__ == "__main__":
    main()
