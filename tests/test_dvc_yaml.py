"""dvc.yaml is held to the code: a stage declares the code, the data and the parameters that it reads, and no others."""

from __future__ import annotations

import ast
import re

import pytest

from tasks.lineage import StageSpec, load_stages
from tasks.params import Params
from tests.imports import ROOT, code_of

SPECS = load_stages(ROOT)


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
