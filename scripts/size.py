"""Fails when a Python file is over 400 lines or a function over 60 (120 in a `kernel.py`).

`scripts/size-allowlist.txt` names what may be larger for now, with its size: it may shrink, never grow, and an entry
that is no longer needed must go.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# A GPU kernel is one function by nature.
MAX_KERNEL_LINES = 120
ROOT = Path(__file__).resolve().parent.parent
ALLOWLIST = ROOT / "scripts" / "size-allowlist.txt"


def main() -> int:
    allowed = dict(read_allowlist())
    found = {name: size for path in python_files() for name, size in too_large(path)}
    problems = [
        f"{name} has {size} lines; split it, {allowed_text(allowed.get(name, 0))}"
        for name, size in sorted(found.items())
        if size > allowed.get(name, 0)
    ]
    problems += [
        f"{name} is allowed {size} lines and has {found.get(name, 'no longer too many')}: lower the entry or remove it"
        for name, size in sorted(allowed.items())
        if found.get(name, 0) < size
    ]
    for problem in problems:
        print(f"scripts/size.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


def read_allowlist() -> Iterator[tuple[str, int]]:
    for line in ALLOWLIST.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, size = line.rsplit(maxsplit=1)
            yield name, int(size)


def python_files() -> list[Path]:
    """Of the working tree, whether committed or not; generated code is not ours to split."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    paths = (ROOT / line for line in listing.stdout.splitlines() if not line.startswith("proto/gen/"))
    return sorted(path for path in paths if path.exists())


def too_large(path: Path) -> Iterator[tuple[str, int]]:
    name = str(path.relative_to(ROOT))
    text = path.read_text()
    num_lines = text.count("\n")
    if num_lines > MAX_FILE_LINES:
        yield name, num_lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > (MAX_KERNEL_LINES if path.name == "kernel.py" else MAX_FUNCTION_LINES):
                yield f"{name}:{node.name}", size


def allowed_text(size: int) -> str:
    return (
        f"the allowlist has {size}"
        if size
        else f"the limits are {MAX_FILE_LINES} a file, {MAX_FUNCTION_LINES} a function"
    )


if __name__ == "__main__":
    sys.exit(main())
