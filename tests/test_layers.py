"""The layers and packages: kernels <- models <- bimedix_jax <- experiments <- scripts, imports point left only.

Everything is read from the syntax trees of the files, so that an import inside a function counts as well.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax import cli, startup

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "models", "bimedix_jax", "experiments", "scripts"]

# kernels are arrays in, arrays out
KERNEL_IMPORTS = {"jax", "numpy", "jaxtyping", "bimedix_jax"}
# the tests, scripts and one side of a benchmark may compare with these, the product never needs them
COMPARISON_ONLY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
COMPARES = "bimedix_jax/bench/peer.py"  # inside functions, which only `bimedix bench ... --against` calls
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
JAX_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}

# what makes records; training, inference and routing work on records that exist
MAY_IMPORT_CURATION = (
    "bimedix_jax.curation",
    "bimedix_jax.commands",
    "bimedix_jax.quickstart",
    "bimedix_jax.evals.tasks",
    "bimedix_jax.evals.documents",
    "bimedix_jax.evals.layouts",
)

MAX_TOP_LEVEL_MODULES = 14
MAX_DATA_LINES = 3200
MAX_MODEL_LINES = 180
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FOR_A_REASON: dict[str, str] = {}  # path -> why the file or a function in it is longer


@dataclass(frozen=True)
class Import:
    """`module` is imported at `path`:`line`; `at_load` when merely importing the file does it."""

    path: Path
    line: int
    module: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def top(found: Import) -> str:
    return found.module.split(".")[0]


def source_files() -> list[Path]:
    found = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    # the symlinks bimedix_jax/{kernels,models} lead to files that are listed under kernels/ and models/ already
    return [path for path in found if path.parts[len(ROOT.parts) + 1] not in ("kernels", "models")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("kernels", "models"):
        parts = ("bimedix_jax", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "bimedix_jax" and len(parts) > 1 and parts[1] in LAYERS[:2] else parts[0]


TREES = {path: ast.parse(path.read_text("utf-8")) for path in source_files()}
MODULES = {module_name(path): path for path in TREES}


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, child.lineno, alias.name, at_load)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    yield Import(path, child.lineno, inner if inner in MODULES else base, at_load)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                for part in child.orelse:
                    yield from walk(part, at_load)
            else:
                deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_load and not deferred)

    yield from walk(TREES[path], at_load=True)


IMPORTS = {path: list(imports_of(path)) for path in TREES}


def loaded_with(module: str) -> set[str]:
    """The project's modules that Python loads to import `module`: the module, its parents, and what they import."""
    loaded, waiting = set(), [module]
    while waiting:
        parts = waiting.pop().split(".")
        for name in (".".join(parts[:length]) for length in range(1, len(parts) + 1)):
            if name in MODULES and name not in loaded:
                loaded.add(name)
                waiting += [found.module for found in IMPORTS[MODULES[name]] if found.at_load]
    return loaded


def external_at_load(module: str) -> list[Import]:
    """What importing `module` makes Python import from outside the project."""
    found = [found for name in loaded_with(module) for found in IMPORTS[MODULES[name]]]
    return [item for item in found if item.at_load and top(item) != "bimedix_jax"]


def load_count_rooms() -> Any:
    path = ROOT / "scripts/count_rooms.py"
    spec = importlib.util.spec_from_file_location("count_rooms", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = load_count_rooms()
SOURCES = rooms.working_tree()
GRAPH = rooms.import_graph(SOURCES)


def every_import() -> list[Import]:
    return [found for listed in IMPORTS.values() for found in listed]


def test_there_is_something_to_check():
    assert {layer_of(module) for module in MODULES} >= {"kernels", "models", "bimedix_jax"}
    assert len(every_import()) > 100


def test_imports_point_left_only():
    wrong = []
    for found in every_import():
        importer, imported = layer_of(module_name(found.path)), layer_of(found.module)
        if imported in LAYERS and LAYERS.index(imported) > LAYERS.index(importer):
            wrong.append(str(found))
    assert not wrong


def test_imports_are_absolute_and_never_of_bare_kernels_or_models():
    """A bare `kernels` is Hugging Face's package, and whoever has it installed would get that one."""
    tests = {path: ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "tests").rglob("*.py"))}
    wrong = [str(found) for found in every_import() if top(found) in ("kernels", "models")]
    for path, tree in (TREES | tests).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "models"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_every_import_of_the_project_exists():
    """`from bimedix_jax.x import y` names a module or package of the tree, also inside a function."""
    missing = [str(i) for i in every_import() if i.module.startswith("bimedix_jax.") and i.module not in MODULES]
    assert not missing


def test_kernels_import_arrays_only():
    ours = [i for i in every_import() if i.path.is_relative_to(ROOT / "kernels")]
    assert not [str(i) for i in ours if top(i) not in KERNEL_IMPORTS | sys.stdlib_module_names]


def test_the_product_never_imports_what_it_is_compared_with():
    product = [i for i in every_import() if layer_of(module_name(i.path)) in LAYERS[:3]]
    found = [i for i in product if top(i) in COMPARISON_ONLY]
    assert not [str(i) for i in found if i.at_load or i.path != ROOT / COMPARES]


def test_only_what_prepares_data_imports_curation():
    """Training, inference, routing, checkpoints and the layers below never need what makes records."""
    product = [i for i in every_import() if layer_of(module_name(i.path)) in LAYERS[:3]]
    wrong = [
        str(i)
        for i in product
        if is_in(i.module, ("bimedix_jax.curation",)) and not is_in(module_name(i.path), MAY_IMPORT_CURATION)
    ]
    assert not wrong


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_no_cycles_between_modules():
    """Imports inside functions and under TYPE_CHECKING count too: whoever reads one file must read the other."""
    assert rooms.cycles(GRAPH) == []


def test_no_cycles_between_packages():
    assert rooms.cycles(rooms.room_graph(SOURCES, GRAPH)) == []


def test_packages_stay_small():
    top = [path for path in SOURCES if path.startswith("bimedix_jax/") and path.count("/") == 1]
    assert len(top) <= MAX_TOP_LEVEL_MODULES
    data = [text for path, text in SOURCES.items() if path.startswith("bimedix_jax/data/")]
    assert sum(len(text.splitlines()) for text in data) <= MAX_DATA_LINES


def test_the_model_reads_like_the_paper():
    assert len(SOURCES["models/mixtral.py"].splitlines()) <= MAX_MODEL_LINES


def test_only_commands_have_a_function_named_run():
    """A command has a `run`; elsewhere the name says nothing."""
    found = [place for place in rooms.functions_named(SOURCES, "run") if "/commands/" not in place]
    assert not found


@pytest.mark.parametrize("name", ["Layout", "Settings"])
def test_class_names_are_unique(name):
    found = rooms.public_classes(SOURCES).get(name, [])
    assert len(found) <= 1, found


def test_no_vague_module_names():
    assert not [str(path) for path in TREES if {path.stem, *path.relative_to(ROOT).parent.parts} & VAGUE_NAMES]


def test_every_folder_of_code_is_a_package():
    """A folder without `__init__.py` would be missing in the wheel."""
    folders = {path.parent for path in TREES if layer_of(module_name(path)) in LAYERS[:3]}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not (ROOT / "tests/__init__.py").exists()


WITHOUT_JAX = ["bimedix_jax.cli", "bimedix_jax.errors", "bimedix_jax.models.config", "bimedix_jax.routing.questions"]


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_no_jax_behind_help_and_statistics(module):
    assert not [str(i) for i in external_at_load(module) if top(i) in JAX_LIBRARIES]


def test_the_options_of_a_command_import_no_jax():
    """`bimedix train --help` imports the command's module, which must not import JAX before it runs."""
    commands = [name for name in MODULES if name.startswith("bimedix_jax.commands")]
    wrong = {f"{name}: {i}" for name in commands for i in external_at_load(name) if top(i) in JAX_LIBRARIES}
    assert not wrong


@pytest.mark.parametrize("command", sorted(startup.WITHOUT_JAX))
def test_commands_that_prepare_nothing_for_jax_never_import_it(command):
    """Whatever they import, also inside functions, does not lead to JAX."""
    reached, waiting = set(), [cli.COMMANDS[command][1]]
    while waiting:
        for name in loaded_with(waiting.pop()) - reached - {"bimedix_jax"}:  # its names are imported when asked for
            reached.add(name)
            waiting += [found.module for found in IMPORTS[MODULES[name]] if found.module in MODULES]
    assert not [str(i) for name in reached for i in IMPORTS[MODULES[name]] if top(i) in JAX_LIBRARIES]


@pytest.mark.parametrize("name", ["kernels", "models"])
def test_packages_have_one_name(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"the name of this package is bimedix_jax.{name}"):
        importlib.import_module(name)


def test_the_help_itself_needs_the_standard_library_only():
    assert not [str(i) for i in external_at_load("bimedix_jax.cli") if top(i) not in sys.stdlib_module_names]


def test_files_and_functions_fit_on_a_screen():
    long = []
    for path, tree in TREES.items():
        name = str(path.relative_to(ROOT))
        if name in LONG_FOR_A_REASON:
            continue
        lines = len(path.read_text("utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef)
                and (size := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
            ):
                long.append(f"{name}:{node.lineno} {node.name}: {size} lines")
    assert not long


def test_scripts_report_problems_in_one_sentence() -> None:
    """Through run_script, and numbers on their command lines are checked."""
    own = {"count_rooms.py", "golden.py", "gpu_check.py", "write_task_files.py"}  # have exit codes of their own
    texts = {path.name: path.read_text("utf-8") for path in (ROOT / "scripts").glob("*.py") if path.name not in own}
    texts = {name: text for name, text in texts.items() if "__main__" in text}
    assert len(texts) > 30
    assert not [name for name, text in texts.items() if "run_script(" not in text]
    hidden = "argparse.SUPPRESS"
    lines = [(name, line) for name, text in texts.items() for line in text.splitlines()]
    assert not [(name, line) for name, line in lines if "type=int" in line and hidden not in line]
