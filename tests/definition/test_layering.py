"""Imports go down only, optional packages stay optional, and starting the command costs nothing."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tinygptq"

# A module may import lower layers, and its own layer where that makes no circle. A package stands for all its modules,
# but for the circles in those that are there for the reader's sake, where each module stands for itself.
LOOSE = {"folders", "measure", "quantization", "release"}
LAYERS = (
    ("errors", "config", "branches", "tokenizer", "tokenizer_rules", "templates"),
    ("packing", "weights", "threads", "memory", "ops", "gptq", "windows", "pictures"),
    ("folders", "kernels"),
    ("kvcache", "model", "backward"),
    ("engine", "cuda", "generate", "sampling"),
    ("calibrate", "records", "quantization", "convert", "release", "measure", "language_model", "text_generation",
     "conversation", "demo", "bench", "doctor"),
    ("cli", "commands", "__init__"),
)  # fmt: skip
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
# llvmlite comes with numba
CORE = {"numpy", "numba", "safetensors", "sentencepiece", "tqdm", "ml_dtypes", "threadpoolctl", "llvmlite"}
# extras: only ever imported inside a function
OPTIONAL = {"tokenizers", "datasets", "jinja2", "huggingface_hub", "gguf", "dask", "distributed", "lm_eval", "matplotlib",
            "cupy", "cupyx", "cuda"}  # fmt: skip
# likewise, and in these modules only
TORCH_ALLOWED = {"convert.pickles": {"torch"}, "measure.validate": {"torch", "transformers"}}


def module_files() -> dict[str, Path]:
    """Dotted name within the package -> file; ``gptq.solver``, ``gptq.__init__``, ``__init__``."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def imported(path: Path) -> set[str]:
    """Absolute names of all that a file imports, at its top or inside functions; not what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def resolve(name: str, modules: dict[str, Path]) -> str:
    """``tinygptq.gptq.solver.solve`` -> ``gptq.solver``; ``tinygptq.gptq.solve`` -> ``gptq.__init__``."""
    parts = name.split(".")[1:]
    while parts:
        for candidate in (".".join(parts), ".".join([*parts, "__init__"])):
            if candidate in modules:
                return candidate
        parts.pop()
    return "__init__"


def graph() -> dict[str, set[str]]:
    modules = module_files()
    own = {name: {n for n in imported(path) if n.split(".")[0] == "tinygptq"} for name, path in modules.items()}
    return {name: {resolve(n, modules) for n in names} - {name} for name, names in own.items()}


def unit(module: str) -> str:
    return module.split(".")[0]


def knot(module: str) -> str:
    """What the search for circles takes for one."""
    return module if unit(module) in LOOSE else unit(module)


def test_every_module_has_a_layer():
    units = {unit(module) for module in module_files()}
    assert units <= set(LAYER), f"not listed: {units - set(LAYER)}"
    assert len(LAYER) == sum(len(names) for names in LAYERS)


def test_imports_never_go_up():
    for module, targets in graph().items():
        for target in targets - {"__init__"}:
            assert LAYER[unit(target)] <= LAYER[unit(module)], f"{module} imports {target}, which is above it"


def test_only_the_top_imports_the_package_itself():
    importers = {module for module, targets in graph().items() if "__init__" in targets}
    assert {LAYER[unit(module)] for module in importers} <= {LAYER["__init__"]}, importers


def test_the_reexports_of_the_package_exist():
    import tinygptq

    assert set(tinygptq.__all__) == set(tinygptq._HOMES)
    for name in tinygptq.__all__:
        assert getattr(tinygptq, name).__module__ == f"tinygptq.{tinygptq._HOMES[name]}"
    assert tinygptq.gptq.solve
    assert tinygptq.packing.pack
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tinygptq.no_such_name


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A path that returns to where it began, or None."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(edges.get(node, ())):
            if found := walk(target, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(edges) if (found := walk(node, []))), None)


def test_the_search_for_circles_finds_them():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_module_imports_itself_by_a_detour():
    """Between units: inside a package, a definition hands over to its twin by an import inside a function."""
    edges: dict[str, set[str]] = {}
    for module, targets in graph().items():
        edges.setdefault(knot(module), set()).update(knot(target) for target in targets)
    assert circle({name: targets - {name} for name, targets in edges.items()}) is None


def test_torch_and_transformers_are_nowhere():
    """But in functions of two modules: to open PyTorch's own pickles when a user allows it, and to compare with them."""
    for module, path in module_files().items():
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"torch", "transformers"} - TORCH_ALLOWED.get(module, set()), module


def test_every_dependency_is_a_declared_one():
    for module, path in module_files().items():
        tops = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"tinygptq"}
        allowed = CORE | OPTIONAL | TORCH_ALLOWED.get(module, set())
        assert tops <= allowed, f"{module} imports {tops - allowed}"
        top_level = {
            name.split(".")[0]
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        optional = OPTIONAL | TORCH_ALLOWED.get(module, set())
        assert not top_level & optional, f"{module} needs {top_level & optional} to be imported at all"


HELP = """from tinygptq.cli import main
try:
    main([{}])
except SystemExit as end:
    assert not end.code"""
HEAVY = ("numba", "numpy", "safetensors", "sentencepiece", "tqdm", "ml_dtypes", "tokenizers", "torch", "transformers")


@pytest.mark.parametrize(
    "code",
    [
        "import tinygptq",
        "import tinygptq; tinygptq.QuantizeConfig(bits=3); tinygptq.TinyGPTQError",
        HELP.format("'--help'"),
        HELP.format("'quantize', '--help'"),
    ],
)
def test_starting_up_imports_nothing_heavy(code):
    script = f"{code}\nimport sys\nprint('LOADED', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "LOADED"


def test_importing_the_definitions_does_not_import_numba():
    modules = ("backward", "config", "folders.checkpoint", "folders.export", "folders.tensorfile", "generate", "gptq",
               "kvcache", "measure.evaluate", "model", "ops", "packing", "quantization.run", "sampling",
               "templates")  # fmt: skip
    imports = ", ".join(f"tinygptq.{name}" for name in modules)
    script = f"import {imports}, sys\nprint('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_is_the_one_beside_the_tests():
    assert Path(importlib.util.find_spec("tinygptq").origin) == PACKAGE / "__init__.py"
