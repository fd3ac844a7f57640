"""docs/threat-model.md: every row links to a test that exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/threat-model.md"
LINK = re.compile(r"\[(test_\w+)\]\((\.\./tests/[\w/]+\.py)\)")


def test_every_row_links_to_a_test_that_exists():
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| fault or input ")]
    assert len(rows) > 50
    missing, tests = [], {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 3, row
        links = LINK.findall(cells[2])
        assert links, row
        for name, place in links:
            path = (PAGE.parent / place).resolve()
            if path not in tests:
                tree = ast.parse(path.read_text("utf-8")) if path.is_file() else ast.Module([], [])
                tests[path] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            if name not in tests[path]:
                missing.append(f"{place}::{name}")
    assert not missing
