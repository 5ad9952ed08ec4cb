"""The Python code in README.md and docs/ runs, block after block, one namespace per page.

A block right after a line `<!-- no-run -->` is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<skip>^<!-- no-run -->\n+)?^```python\n(?P<code>.*?)^```$", flags=re.M | re.S)


def blocks(text: str) -> list[tuple[int, str]]:
    """(line before the code, code) of every Python block that is to be run."""
    found = [m for m in BLOCK.finditer(text) if not m["skip"]]
    return [(text.count("\n", 0, m.start("code")), m["code"]) for m in found]


RUNNABLE = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a page writes does not land in the checkout
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        # Leading newlines make a traceback show the page's own line numbers.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_readme_has_code_and_marks_are_honoured() -> None:
    assert ROOT / "README.md" in RUNNABLE
    text = "a\n```python\nx = 1\n```\n<!-- no-run -->\n```python\nraise SystemExit\n```\n```bash\nls\n```\n"
    assert blocks(text) == [(2, "x = 1\n")]
