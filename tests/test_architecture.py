"""The laws of the house: rooms in one order, the oracle's independence, complete lists, small modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"harness", "reference", "kernels", "cases", "tests"}
#: A top-level package may import from itself and from these.
ALLOWED = {"reference": set(), "kernels": set(), "harness": {"reference"}, "cases": {"harness"}}

#: The rooms of harness/ from the ground up. A module imports from its own room and from those before it in this list.
ROOMS = (
    "base", "problem", "trace", "results", "device", "protocol", "backend", "ci", "report", "inputs", "oracle",
    "diagnose", "session", "scenarios", "run", "perf", "mutate", "plugin", "commands", "cli", "__main__",
)  # fmt: skip
#: The rooms inside of perf/, likewise.
PERF = ("metrics", "count", "timing", "versions", "compare", "bisect")
STANDARD_LIBRARY_ONLY = ("base", "problem", "results", "ci")
#: Imports of packages that are asked for only where they are there, by room.
OPTIONAL = {("base", "tomli"), ("base", "pip"), ("base", "hypothesis")}
#: A module of these rooms works by being imported: it must be in the list of its room's __init__.
LISTED = {
    "harness/scenarios": {"registry", "metamorphic", "stage_call"},
    "harness/scenarios/stateful": {"state", "steps"},
    "harness/diagnose/faults": {"registry"},
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> list[tuple[ast.stmt, str]]:
    """(statement, module) of every import of a file, inside of functions too.

    For "from a import b" a.b if b is a module.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                place = ROOT / full.replace(".", "/")
                found.append((node, full if place.with_suffix(".py").exists() or place.is_dir() else node.module))
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_from_those_below(package):
    wrong = {
        name_of(path): module
        for path in modules(package)
        for _, module in imported(path)
        if module.split(".")[0] in OURS - ALLOWED[package] - {package}
    }
    assert wrong == {}


@pytest.mark.parametrize(("parent", "order"), [("harness", ROOMS), ("harness.perf", PERF)])
def test_imports_between_rooms_go_one_way(parent, order):
    depth = parent.count(".") + 1

    def floor(module: str) -> int | None:
        parts = module.split(".")
        inside = module.startswith(parent + ".") and len(parts) > depth
        return order.index(parts[depth]) if inside else None

    wrong = [
        f"{name_of(path)} imports {module}"
        for path in modules(parent.replace(".", "/"))
        for _, module in imported(path)
        if (here := floor(name_of(path))) is not None and (there := floor(module)) is not None and there > here
    ]
    assert wrong == []


def test_every_room_is_in_the_order():
    rooms = {path.stem for path in (ROOT / "harness").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert rooms - {"__init__"} == set(ROOMS)


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {name_of(path): {module for _, module in imported(path)} for path in modules("harness")}
    graph = {name: {other for other in others if other in graph and other != name} for name, others in graph.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph.keys() == set()


def test_no_import_hides_behind_type_checking():
    wrong = [
        name_of(path)
        for path in modules("harness")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and "harness" in ast.unparse(node)
    ]
    assert wrong == []


@pytest.mark.parametrize("room", [*(f"harness/{room}" for room in STANDARD_LIBRARY_ONLY), "reference/scheme.py"])
def test_a_room_of_the_standard_library_alone(room):
    paths = modules(room) if (ROOT / room).is_dir() else [ROOT / room]
    wrong = {
        name_of(path): module
        for path in paths
        for _, module in imported(path)
        if module.split(".")[0] not in sys.stdlib_module_names | {"harness", "cases"}
        and module != "reference.scheme"  # the facts of formats: itself in this list
        and (path.parent.name, module.split(".")[0]) not in OPTIONAL
    }
    assert wrong == {}


def test_ci_needs_nothing_installed():
    """The matrix is read before anything is installed."""
    program = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "numpy", "pytest", "hypothesis", "scipy", "ml_dtypes"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
import harness.ci.annotate, harness.ci.durations, harness.ci.gather, harness.ci.matrix
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("room", LISTED)
def test_a_module_that_registers_itself_is_in_the_list(room):
    path = ROOT / room
    owner = path if room != "harness/scenarios/stateful" else path.parent
    listed = {module for _, module in imported(owner / "__init__.py")}
    here = {f"{room.replace('/', '.')}.{module.stem}" for module in path.glob("*.py")} - {
        f"{room.replace('/', '.')}.__init__"
    }
    assert here - listed == {f"{room.replace('/', '.')}.{helper}" for helper in LISTED[room]} - listed


#: Names and largest values of formats, and where they may stand as literals: nowhere but with the scheme, and where
#: another project's names or a device's hardware are described.
LITERALS = {"e4m3", "e5m2", 448, 464, 57344}
DESCRIBED = {
    "reference.scheme", "reference.formats",
    "harness.trace.interpreter",  # Triton's types
    "harness.perf.count.compiled",  # torch's names, shortened
    "harness.device",  # Hopper's fp8 instructions
}  # fmt: skip


def test_formats_are_described_by_the_scheme_alone():
    wrong = [
        f"{name_of(path)}:{node.lineno}: {node.value!r}"
        for package in ("harness", "reference")
        for path in modules(package)
        if name_of(path) not in DESCRIBED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and not isinstance(node.value, bool) and node.value in LITERALS
    ]
    assert wrong == []


def test_reference_imports_torch_only():
    wrong = {
        name_of(path): module
        for path in modules("reference")
        for _, module in imported(path)
        if module.split(".")[0] not in {"torch", "reference"} | sys.stdlib_module_names
    }
    assert wrong == {}


def test_modules_stay_small():
    lengths = {name_of(path): len(path.read_text().splitlines()) for package in ALLOWED for path in modules(package)}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_functions_stay_small():
    lengths = {}
    for path in (*modules("harness"), *modules("reference")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = node.body[0] if ast.get_docstring(node) else None
                of_doc = doc.end_lineno - doc.lineno + 1 if doc else 0
                lengths[f"{name_of(path)}.{node.name}"] = node.end_lineno - node.lineno + 1 - of_doc
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_the_hall_stays_empty():
    assert len(list((ROOT / "harness").glob("*.py"))) <= 8
