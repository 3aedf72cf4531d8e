"""Imports point one way: read from the source, so that a hidden import inside a function counts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("datamodules", "classifiers", "explainers")
SCRIPTS = ("train", "evaluate", "benchmarks", "tests")
WINGS = ("learned", "attribution", "evaluation", "inference")


def sources(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def module_name(path: Path) -> str:
    """Dotted name; that of a package for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sources(package)}


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Our modules that a file imports, anywhere in it, names of a package resolved to modules."""
    package = path.parent.relative_to(root).parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= submodules or {base}
    return {name for name in found if name.split(".")[0] in (*PACKAGES, *SCRIPTS)}


def wing(module: str) -> str | None:
    """The wing of explainers that a module lies in; None for the base and for what joins wings."""
    parts = module.split(".")
    return parts[1] if parts[0] == "explainers" and len(parts) > 1 and parts[1] in WINGS else None


GRAPH = {module: imported(path) for module, path in MODULES.items()}
EXPLAINERS = [module for module in GRAPH if module.startswith("explainers")]
JOINING = {"explainers", "explainers.__main__"}  # the package's face and its command line


def test_the_graph_is_read_right() -> None:
    assert "explainers.views" in GRAPH["explainers.base"]
    assert "classifiers.network" in GRAPH["explainers.base"]
    assert GRAPH["explainers.evaluation.metrics.mean"] == set()
    assert wing("explainers.learned.single") == "learned"
    assert wing("explainers.views") is wing("classifiers.network") is None


def test_hidden_and_relative_imports_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "explainers" / "learned"
    folder.mkdir(parents=True)
    source = "def f():\n    from ..attribution import cam\n    import datamodules.base\n"
    (folder / "sly.py").write_text(source)
    assert imported(folder / "sly.py", tmp_path) == {
        "explainers.attribution.cam",
        "datamodules.base",
    }


@pytest.mark.parametrize("package", ["datamodules", "classifiers"])
def test_data_and_classifiers_import_nothing_of_ours(package: str) -> None:
    own = {module: names for module, names in GRAPH.items() if module.split(".")[0] == package}
    foreign = {m: {n for n in names if n.split(".")[0] != package} for m, names in own.items()}
    assert {module: names for module, names in foreign.items() if names} == {}


def test_explainers_import_little_from_the_other_packages() -> None:
    for module in EXPLAINERS:
        allowed = {"classifiers.network", "classifiers.optimisation"}
        if wing(module) == "inference" or module == "explainers.__main__":
            allowed |= {"datamodules.images"}
        if module == "explainers.__main__":
            allowed |= {"datamodules.base"}
        outside = {name for name in GRAPH[module] if not name.startswith("explainers")}
        assert outside <= allowed, f"{module} imports {outside - allowed}"


def test_no_wing_uses_another() -> None:
    for module in set(EXPLAINERS) - JOINING:
        used = {wing(name) for name in GRAPH[module]} - {None, wing(module)}
        assert used == set(), f"{module} uses {used}"
        assert not GRAPH[module] & JOINING, f"{module} imports all wings through {JOINING}"


def test_formulas_import_nothing_of_ours() -> None:
    formulas = {"explainers.evaluation.statistics", "explainers.learned.losses"}
    formulas |= {"explainers.learned.generators", "explainers.batches"}
    for module in formulas:
        assert GRAPH[module] == set(), module
    assert GRAPH["explainers.views"] == {"explainers.batches"}  # views run in batches too
    metrics = "explainers.evaluation.metrics"
    for module in (name for name in GRAPH if name.startswith(metrics)):
        foreign = {name for name in GRAPH[module] if not name.startswith(metrics)}
        assert foreign == set(), f"{module} imports {foreign}"


def test_nothing_imports_the_scripts() -> None:
    for module, names in GRAPH.items():
        assert not {name.split(".")[0] for name in names} & set(SCRIPTS), module


def test_no_file_is_a_drawer() -> None:
    names = {
        path.stem for package in (*PACKAGES, "tests", "benchmarks") for path in sources(package)
    }
    assert not names & {"utils", "helpers", "misc", "common"}


def test_every_package_is_named_for_the_build() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            assert f'"{module}"' in text, f"{module} is missing in pyproject's packages"
