"""Imports point one way, and the core imports no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "detloss_plugins"
# What a module may import of this package, by the first part of its path within the package.
ALLOWED = {
    "reduction": {"execution"},
    "geometry": {"execution"},
    "registry": set(),
    "execution": set(),
    "base": {"execution", "reduction"},
    "families": {"base", "execution", "reduction"},
    "losses": {"base", "families", "execution", "geometry", "reduction", "registry", "losses"},
    "__init__": {"losses", "registry"},
    "adapters": {"base", "families", "geometry", "losses", "reduction", "registry", "adapters", ""},
}
FRAMEWORKS = {"mmdet", "mmcv", "ultralytics", "torchvision"}


def imports(path):
    """Dotted names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if node.module == "detloss_plugins" else node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "detloss_plugins":
            target = rest[0] if rest and (PACKAGE / rest[0]).exists() | (PACKAGE / f"{rest[0]}.py").exists() else ""
            assert target in ALLOWED[part], f"{part} must not import {name}"
        if package in FRAMEWORKS:
            assert part == "adapters", f"only adapters import {package}"
        if package == "mmengine":
            assert part in {"registry", "adapters"}


def test_core_works_without_any_framework():
    """In a process where they cannot be imported; also in one, all there is to know of them stays unimported."""
    code = (
        "import sys\n"
        f"for name in {sorted(FRAMEWORKS)}: sys.modules[name] = None\n"
        "import torch, detloss_plugins\n"
        "loss = detloss_plugins.build_loss(dict(type='CIoULoss'))\n"
        "print(loss(torch.tensor([[0., 0, 2, 2]]), torch.tensor([[0., 0, 4, 2]])).item())\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in "
        f"{FRAMEWORKS!r} and sys.modules[n]]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.5532, abs=1e-4)
