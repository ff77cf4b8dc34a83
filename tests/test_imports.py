"""Imports point one way, and the core imports no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "detloss_plugins"
# What a module may import of this package, by the first part of its path within the package, the lowest first.
ALLOWED = {
    "precision": set(),
    "nested": set(),
    "reduction": set(),
    "facts": set(),
    "registry": set(),
    "configs": set(),
    "geometry": {"precision"},
    "engine": {"precision", "reduction"},
    "loss": {"engine", "facts", "nested", "precision", "reduction"},
}
ALLOWED["families"] = {*ALLOWED} - {"registry", "geometry"}
ALLOWED["losses"] = {*ALLOWED, "losses"}
ALLOWED["adapters"] = {*ALLOWED, "adapters", ""}  # of the package itself the version
ALLOWED["testing"] = {*ALLOWED, "testing"} - {"adapters"}
ALLOWED["study"] = set()
ALLOWED["ablation"] = {*ALLOWED, "ablation", "cli", ""}  # of the command, how it trains; the version
ALLOWED["advice"] = {"ablation", "advice", "study"}
ALLOWED["cli"] = {*ALLOWED, "cli", ""}
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = {"losses", "registry", "adapters"}
FRAMEWORKS = {"mmdet", "mmcv", "ultralytics", "torchvision"}
# What a part that is used without them imports in its functions only; it may use frameworks there.
HEAVY = {*FRAMEWORKS, "mmengine", "matplotlib", "scipy", "sklearn"}
LAZY = {"cli": HEAVY, "testing": {*FRAMEWORKS, "mmengine"}, "advice": HEAVY, "ablation": HEAVY}
WITH_FRAMEWORKS = {PACKAGE / "adapters" / name for name in ("mmdetection", "ultralytics")}
WITH_MMENGINE = {"registry", "adapters"}


def imports(path, when_imported=False):
    """Dotted names that a file imports, at all or, leaving its functions out, when it is imported itself."""
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if not (when_imported and isinstance(node, ast.FunctionDef)):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if node.module.startswith("detloss_plugins") else node.module


def part_of(name):
    """The part of the package that a dotted name in it belongs to; "" for the package itself."""
    first = [*name.split("."), ""][1]
    return first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists() else ""


def test_layers():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(path):
            package, where = name.split(".")[0], path.relative_to(PACKAGE)
            if package == "detloss_plugins":
                assert part_of(name) in ALLOWED[part], f"{where} must not import {name}"
            if part in LAZY:
                continue
            if package in FRAMEWORKS:
                assert WITH_FRAMEWORKS & {*path.parents}, f"{where} must not import {name}"
            if package == "mmengine":
                assert part in WITH_MMENGINE, f"{where} must not import {name}"


@pytest.mark.parametrize("part", LAZY)
def test_what_is_used_without_a_framework_imports_it_in_functions_only(part):
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path, when_imported=True):
            assert name.split(".")[0] not in LAZY[part], f"{path.relative_to(PACKAGE)} must not import {name} at once"


def test_the_package_itself_imports_two_adapters_only():
    found = {name for name in imports(PACKAGE / "__init__.py") if part_of(name) == "adapters"}
    assert found == {"detloss_plugins.adapters.detr", "detloss_plugins.adapters.heads"}


def test_no_test_module_imports_another_and_conftest_imports_no_tool():
    modules = {path.stem for path in TESTS.rglob("test_*.py")}
    tools = {path.stem for path in (TESTS.parent / "tools").glob("*.py")}
    assert modules
    assert tools
    for path in TESTS.rglob("*.py"):
        refused = modules | (tools if path.stem == "conftest" else set())
        assert not {name.split(".")[0] for name in imports(path)} & refused, path.name


def test_core_works_without_any_framework():
    """In a process where they cannot be imported; also in one, all there is to know of them stays unimported."""
    code = (
        "import sys\n"
        f"for name in {sorted(FRAMEWORKS)}: sys.modules[name] = None\n"
        "import torch, detloss_plugins\n"
        "loss = detloss_plugins.build_loss(dict(type='CIoULoss'))\n"
        "print(loss(torch.tensor([[0., 0, 2, 2]]), torch.tensor([[0., 0, 4, 2]])).item())\n"
        "loss = detloss_plugins.build_loss(dict(type='JointLoss', losses=[dict(type='VarifocalLoss')]))\n"
        "assert loss.__class__ is type(loss), 'without mmdet there is nothing to be seen as'\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in "
        f"{FRAMEWORKS!r} and sys.modules[n]]\n"
        "if hasattr(torch.compiler, 'is_compiling'):\n"
        "    assert 'torch._dynamo' not in sys.modules, 'its import takes as long as that of torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.5532, abs=1e-4)
