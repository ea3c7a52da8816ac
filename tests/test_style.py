"""The rules of docs/style.md that a machine can check: private words in names, docstrings and public classes."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "harness",
    "reference",
    "kernels",
    "cases",
)  #: kernels/ keeps its names: entries of cases/bugs/ contain them
FUNCTIONS = {"told", "said", "found"}
VARIABLES = {"told", "said", "handed"}
WORDS = re.compile(r"\b(whoever|whatever it is|somebody|nobody's)\b", re.IGNORECASE)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@pytest.mark.parametrize("package", ("harness", "reference", "cases"))
def test_no_name_is_a_private_word(package):
    wrong = []
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.strip("_") in FUNCTIONS:
                wrong.append(f"{place(path, node)}: function {node.name}")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.strip("_") in VARIABLES:
                wrong.append(f"{place(path, node)}: variable {node.id}")
            elif isinstance(node, ast.arg) and node.arg.strip("_") in VARIABLES:
                wrong.append(f"{place(path, node)}: argument {node.arg}")
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_docstring_or_comment_has_a_pronoun_for_a_subject(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{token.start[0]}: {hit[0]}"
        for path in sources(package)
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if token.type == tokenize.COMMENT or token.string.startswith(('"""', "#"))
        if (hit := WORDS.search(token.string))
    ]
    assert wrong == []


def test_no_two_public_classes_share_a_name():
    places = defaultdict(list)
    for package in ("harness", "reference"):
        for path in sources(package):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(place(path, node))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("package", ("harness", "reference"))
def test_every_function_is_annotated(package):
    wrong = []
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "_":
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    wrong.append(f"{place(path, node)}: {node.name}({', '.join(bare)})")
    assert wrong == []


@pytest.mark.parametrize("package", ("harness", "reference", "cases"))
def test_every_public_function_and_class_has_a_docstring(package):
    wrong = []
    for path in sources(package):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(
                ("_", "test_", "pytest_")
            ):
                if not ast.get_docstring(node):
                    wrong.append(f"{place(path, node)}: {node.name}")
    assert wrong == []
