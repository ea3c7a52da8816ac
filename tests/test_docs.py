"""docs/architecture.md against the code: the rooms and their public names, the paths, the walk of one case."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOMS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
NUMBER = re.compile(r"(?<![\w.-])[+-]?\d+\.\d+(?:e[+-]?\d+)?")


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    section = PAGE.split(f"## {heading}\n")[1]
    lines = re.search(r"(^\|.*\n)+", section, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def defined(room: str) -> set[str]:
    """Return the top-level names of a room's modules, and the names of the modules."""
    place = ROOT / "harness" / room
    names = set()
    for path in [place] if place.suffix else place.rglob("*.py"):
        names.add(path.stem)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_the_page_lists_the_rooms_in_their_order():
    listed = [row[0].strip("`/").removesuffix(".py") for row in table("The rooms of harness/")]
    assert listed == list(ROOMS)


def test_the_public_names_of_a_room_are_defined_in_it():
    missing = {
        room: absent
        for room, _, public in table("The rooms of harness/")
        if (absent := set(re.findall(r"`(\w+)`", public)) - defined(room.strip("`/")))
    }
    assert missing == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_a_page_exists(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    top = "|".join(("harness", "reference", "kernels", "cases", "tests", "docs", r"\.github", r"\.ci"))
    paths = set(re.findall(rf"`((?:{top})/[^`\s:]*)`", re.sub(r"<[^>]*>", "*", text)))
    paths |= {f"docs/{name}" if page.parent.name == "docs" else name for name in re.findall(r"\]\(([\w./-]+)\)", text)}
    absent = [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    assert absent == []


def test_the_page_contains_the_walk():
    """Words must be equal. Numbers may differ by 10 %: they depend on the machine and the version of torch."""
    ran = subprocess.run([sys.executable, "docs/walk.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = PAGE.split("docs/walk.py")[1].split("```\n")[1]
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", ran.stdout)
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (shown, ran.stdout)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.01)
