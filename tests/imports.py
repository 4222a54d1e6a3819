"""What a stage's code imports, read from its source; for tests of what it declares and of what it can reach."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Plumbing that cannot change a byte of what a stage writes. It starts the stage, checks and hands over its parameters
# (DVC compares their values themselves), says what does not fit, renames its outputs, mirrors its metrics, reads
# dvc.yaml. Were it declared, a better message or another tag in MLflow would train every model again.
PLUMBING = {f"tasks/{name}.py" for name in ("run", "stage", "params", "demands", "tracking", "lineage")}


def file_of(module: str) -> str | None:
    """The file of one of our modules; a package is its __init__.py."""
    path = module.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if (ROOT / file).exists()), None)


def nodes_that_run(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`; without functions, what runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if not functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from nodes_that_run(node, functions)


def imported(file: str, functions: bool = True) -> set[str]:
    """Names of our modules that a file imports."""
    names: set[str] = set()
    for node in nodes_that_run(ast.parse((ROOT / file).read_text()), functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are absolute here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("tasks", "flows") and file_of(name)}


def code_of(stage: str) -> set[str]:
    """Every file of ours that the stage's module leads to, itself included, plumbing not."""
    seen: set[str] = set()
    pending = {f"tasks.{stage}"}
    while pending:
        module = pending.pop()
        file = file_of(module)
        if file is None or file in seen or file in PLUMBING:
            continue
        seen.add(file)
        pending |= imported(file)
        # A package on the way is run too, but of it only what runs at import
        parts = module.split(".")
        for end in range(1, len(parts)):
            package = file_of(".".join(parts[:end]))
            assert package
            pending |= imported(package, functions=False)
    return {file for file in seen if not file.endswith("__init__.py") or file == file_of(f"tasks.{stage}")}
