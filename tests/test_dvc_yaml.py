"""dvc.yaml is held to the code: a stage declares the code, the data and the parameters that it reads, and no others."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from tasks.lineage import StageSpec, load_stages
from tasks.params import Params, load_params
from tests.imports import ROOT, code_of

SPECS = load_stages(ROOT)


def covers(declared: str, path: str) -> bool:
    return path == declared or path.startswith(declared + "/")


@pytest.mark.parametrize("stage", SPECS)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    declared = {dep for dep in SPECS[stage].deps if dep not in SPECS[stage].data_deps}
    needed = set(code_of(stage))
    missing = {file for file in needed if not any(covers(dep, file) for dep in declared)}
    # a page's template bears the name of the module that fills it in
    needed |= {str(page.relative_to(ROOT)) for page in ROOT.glob("tasks/*.html") if f"tasks/{page.stem}.py" in needed}
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


def keys_read(file: str) -> set[str]:
    """The keys of params.yaml that a file reads: from `stage.params`, from a name that is bound to it, and from an
    argument that is annotated with Params. Dotted as far as the expression goes: `rank.labeler`, or `rank` alone where
    the whole section is taken."""
    keys: set[str] = set()
    for function in ast.walk(ast.parse((ROOT / file).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [*function.args.args, *function.args.kwonlyargs]
        whole = {"stage.params"} | {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "Params"}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and ast.unparse(node.value) in whole:
                whole |= {ast.unparse(target) for target in node.targets}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "flat_params":
                keys |= set(Params.model_fields) if ast.unparse(node.args[0]) in whole else set()
        attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        within = {node.value for node in attributes}
        paths = [ast.unparse(node) for node in attributes if node not in within]
        keys |= {path.removeprefix(f"{name}.") for path in paths for name in whole if path.startswith(f"{name}.")}
    found = [key.split(".") for key in keys]
    return {
        ".".join([Params.model_fields[section].alias or section, *rest])
        for section, *rest in found
        if section in Params.model_fields
    }


def key_covers(declared: str, key: str) -> bool:
    return key == declared or key.startswith(declared + ".")


def test_git_ignores_what_dvc_keeps_and_nothing_else() -> None:
    """One committed file has all lines: DVC would write those that lack, and take them back when `dvc repro` fails."""
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values()
    cached = {out for stage in stages for out in stage.get("outs", []) if isinstance(out, str)}  # else {path: options}
    outs = [out for spec in SPECS.values() for out in spec.outs]
    asked = ["git", "check-ignore", "--no-index", *outs]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == cached
    lines = [line for line in (ROOT / "data/.gitignore").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not any(covers(f"data{line}", out) for out in cached)] == []


@pytest.mark.parametrize("stage", SPECS)
def test_params_are_what_the_stage_reads(stage: str) -> None:
    read = set().union(*(keys_read(file) for file in code_of(stage)))
    declared = SPECS[stage].params
    missing = {key for key in read if not any(key_covers(one, key) for one in declared)}
    idle = {one for one in declared if not any(key_covers(one, key) for key in read)}
    assert not missing, f"add to the params of `{stage}` in dvc.yaml: {sorted(missing)}"
    assert not idle, f"`{stage}` reads nothing of these; remove them from its params: {sorted(idle)}"


def test_every_section_of_the_schema_is_read_by_a_stage() -> None:
    known = {field.alias or name for name, field in Params.model_fields.items()}
    assert known == {key.partition(".")[0] for spec in SPECS.values() for key in spec.params}


def test_what_only_ranking_reads_leaves_the_samples_as_they_are() -> None:
    """All that follows from the samples would be made again, the policy among it."""
    before = load_params(ROOT / "params.yaml")

    def stages_that_see(**change: object) -> set[str]:
        after = before.model_copy(update={"rank": before.rank.model_copy(update=change)})
        return {name for name, spec in SPECS.items() if before.declared(spec.params) != after.declared(spec.params)}

    # `prepare` checks that there is enough for them, and writes the same again
    assert stages_that_see(held_out_share=0.3) == {"prepare", "rank", "report"}
    assert stages_that_see(labeler="recorded") == {"prepare", "sample", "rank", "report"}


def test_what_prepare_does_not_check_leaves_it_alone() -> None:
    ppo = set(SPECS["prepare"].params)
    assert not any(key_covers(declared, key) for declared in ppo for key in ("ppo.kl_coef", "sft.epochs", "register"))


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: str(spec.name))
def test_commands_hold_nothing_that_could_differ_between_machines(spec: StageSpec) -> None:
    assert spec.cmd == f"python -m tasks.run {spec.name}"
    assert {"retries", "memory_gb"} <= set(spec.meta)


def test_the_walk_sees_imports_inside_functions_and_not_those_for_types() -> None:
    assert "tasks/ppo/pipeline.py" in code_of("ppo"), "imported inside a function"
    assert "tasks/ppo/pipeline.py" not in code_of("sample"), "a package on the way is not the stage"
    assert not any(file.startswith("flows/") for stage in SPECS for file in code_of(stage))
