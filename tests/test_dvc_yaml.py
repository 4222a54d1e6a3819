"""dvc.yaml is held to the code: a stage declares the code, the data and the parameters that it reads, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.lineage import StageSpec, load_stages
from tasks.params import Params

ROOT = Path(__file__).parents[1]
SPECS = load_stages(ROOT)
# Plumbing that cannot change a byte of what a stage writes. It starts the stage, checks and hands over its parameters
# (DVC compares their values themselves), renames its outputs, mirrors its metrics, reads dvc.yaml. Were it declared,
# a better message or another tag in MLflow would train every model again.
PLUMBING = {f"tasks/{name}.py" for name in ("run", "stage", "params", "tracking", "lineage")}


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


def covers(declared: str, path: str) -> bool:
    return path == declared or path.startswith(declared + "/")


@pytest.mark.parametrize("stage", SPECS)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    declared = {dep for dep in SPECS[stage].deps if dep not in SPECS[stage].data_deps}
    needed = code_of(stage)
    missing = {file for file in needed if not any(covers(dep, file) for dep in declared)}
    idle = {dep for dep in declared if not any(covers(dep, file) for file in needed)}
    assert not missing, f"add to the deps of `{stage}` in dvc.yaml: {sorted(missing)}"
    assert not idle, f"`{stage}` imports nothing of these; remove them from its deps: {sorted(idle)}"


def patterns_given_to(method: str, stage: str) -> list[str]:
    """The paths in `stage.dep(...)` or `stage.out(...)` as regular expressions; {name} in an f-string is any name."""
    found = []
    for file in code_of(stage):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == f"stage.{method}"):
                continue
            (path,) = node.args
            if isinstance(path, ast.Constant):
                found.append(re.escape(str(path.value)))
            else:
                assert isinstance(path, ast.JoinedStr), f"{file}: stage.{method} takes a text, not {ast.unparse(path)}"
                parts = [re.escape(str(p.value)) if isinstance(p, ast.Constant) else "[^/]+" for p in path.values]
                found.append("".join(parts))
    return found


@pytest.mark.parametrize("stage", SPECS)
def test_data_deps_are_what_the_stage_reads(stage: str) -> None:
    read = patterns_given_to("dep", stage)
    declared = SPECS[stage].data_deps
    for pattern in read:
        assert any(
            re.fullmatch(pattern, dep) or re.match(re.escape(dep) + "/", pattern.replace("\\", "")) for dep in declared
        ), f"`{stage}` reads {pattern}, which is not among its deps"
    for dep in declared:
        assert any(re.fullmatch(pattern, dep) or re.match(re.escape(dep) + "/", pattern) for pattern in read), (
            f"`{stage}` declares {dep} and does not read it"
        )


@pytest.mark.parametrize("stage", SPECS)
def test_outs_are_what_the_stage_writes(stage: str) -> None:
    written = patterns_given_to("out", stage)
    assert {out for out in SPECS[stage].outs if not any(re.fullmatch(p, out) for p in written)} == set()
    assert {p for p in written if not any(re.fullmatch(p, out) for out in SPECS[stage].outs)} == set()


def sections_read(file: str) -> set[str]:
    """The sections of params.yaml that a file reads: from `stage.params`, from a name that is bound to it, and from an
    argument that is annotated with Params."""
    sections: set[str] = set()
    for function in ast.walk(ast.parse((ROOT / file).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [*function.args.args, *function.args.kwonlyargs]
        whole = {"stage.params"} | {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "Params"}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and ast.unparse(node.value) in whole:
                whole |= {ast.unparse(target) for target in node.targets}
        sections |= {
            node.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in whole
        }
    return {Params.model_fields[name].alias or name for name in sections if name in Params.model_fields}


@pytest.mark.parametrize("stage", SPECS)
def test_params_are_what_the_stage_reads(stage: str) -> None:
    read = set().union(*(sections_read(file) for file in code_of(stage)))
    assert read == set(SPECS[stage].params)


def test_every_section_of_the_schema_is_read_by_a_stage() -> None:
    known = {field.alias or name for name, field in Params.model_fields.items()}
    assert known == {section for spec in SPECS.values() for section in spec.params}


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: str(spec.name))
def test_commands_hold_nothing_that_could_differ_between_machines(spec: StageSpec) -> None:
    assert spec.cmd == f"python -m tasks.run {spec.name}"
    assert {"retries", "memory_gb"} <= set(spec.meta)


def test_the_walk_sees_imports_inside_functions_and_not_those_for_types() -> None:
    assert "tasks/ppo/pipeline.py" in code_of("ppo"), "imported inside a function"
    assert "tasks/ppo/pipeline.py" not in code_of("sample"), "a package on the way is not the stage"
    assert not any(file.startswith("flows/") for stage in SPECS for file in code_of(stage))
