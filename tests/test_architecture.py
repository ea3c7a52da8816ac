"""The laws of the house that a test can hold: floors, the oracle's independence, size of modules."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"harness", "reference", "kernels", "cases", "tests"}
#: A room may import from itself and from these.
ALLOWED = {"reference": set(), "kernels": set(), "harness": {"reference"}, "cases": {"harness"}}


def imports(path: Path) -> set[str]:
    """Top-level names of our own rooms that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found & OURS


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_from_floors_below(room):
    wrong = {}
    for path in (ROOT / room).rglob("*.py"):
        if strange := imports(path) - ALLOWED[room] - {room}:
            wrong[str(path.relative_to(ROOT))] = strange
    assert wrong == {}


def test_reference_imports_torch_only():
    for path in (ROOT / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            strange = {n.split(".")[0] for n in names} - {"torch", "reference"} - sys.stdlib_module_names
            assert not strange, (path.name, strange)


def test_modules_stay_small():
    long = {
        str(p.relative_to(ROOT)): n
        for room in ALLOWED
        for p in (ROOT / room).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert long == {}
