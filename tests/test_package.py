"""What people install: its configs by name, and what is in the wheel and the source distribution."""

import email
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import detloss_plugins
from detloss_plugins.configs import FRAMEWORKS, find, names
from detloss_plugins.registry import registered_losses

ROOT = Path(__file__).parents[1]
CONFIGS = {path for path in (ROOT / "configs").rglob("*.*") if path.suffix in {".py", ".yaml"}}
UV = os.environ.get("UV", "uv")  # which uv run sets
MMENGINE = "from mmengine.config import Config; read = lambda path, *task: Config.fromfile(path).model"
# The host of a framework, and how a config is read with it.
READ = {
    "mmdetection": ("mmdet", MMENGINE),
    "mmrotate": ("mmrotate", MMENGINE),
    "ultralytics": ("ultralytics", "from detloss_plugins.adapters.ultralytics import load_losses as read"),
}


def test_every_config_has_a_name_of_its_own():
    assert {find(name) for name in names()} == {path for path in CONFIGS if path.parent.name != "_base_"}
    assert names() == sorted(name for framework in FRAMEWORKS for name in names(framework))
    assert all(find(name).parent.name == framework for framework in FRAMEWORKS for name in names(framework))


def test_an_unknown_config_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"named 'retinanet_r18_digits'; did you mean .*retinanet_r18_fpn_digits"):
        find("retinanet_r18_digits")
    with pytest.raises(ValueError, match=r"named 'xyzxyz'; `detloss list --configs` lists them"):
        find("xyzxyz")
    with pytest.raises(ValueError, match="and none for 'keras'"):
        names("keras")


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first[1] == detloss_plugins.__version__


def run(*command, **kwargs):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution, from which the wheel is built."""
    folder = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--quiet", "--out-dir", folder, ROOT)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with what the wheel installs, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    run(UV, "pip", "install", "--quiet", "--python", sys.executable, "--no-deps", "--target", folder, built[0])
    return folder


@pytest.mark.slow
def test_what_is_in_the_wheel(built):
    files = set(zipfile.ZipFile(built[0]).namelist())
    info = f"detloss_plugins-{detloss_plugins.__version__}.dist-info"
    assert {"detloss_plugins/py.typed", f"{info}/licenses/LICENSE"} <= files
    package = (path for path in (ROOT / "detloss_plugins").rglob("*.*") if path.suffix != ".pyc")
    sources = {*CONFIGS, *package}
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    expected = {path if path.startswith("detloss_plugins/") else f"detloss_plugins/{path}" for path in expected}
    assert {path for path in files if not path.startswith(info)} == expected
    entry = zipfile.ZipFile(built[0]).read(f"{info}/entry_points.txt").decode()
    assert "detloss = detloss_plugins.cli:main" in entry


@pytest.mark.slow
def test_what_is_in_the_source_distribution(built):
    top = f"detloss_plugins-{detloss_plugins.__version__}/"
    files = {name.removeprefix(top) for name in tarfile.open(built[1]).getnames()}
    assert {"detloss_plugins/py.typed", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= files
    assert {path.relative_to(ROOT).as_posix() for path in CONFIGS} <= files
    assert {file.split("/")[0] for file in files if "/" in file} == {"detloss_plugins", "configs"}


@pytest.mark.slow
def test_metadata(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == detloss_plugins.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "the detloss_plugins authors"
    needed = [line.split(";")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"\w+", line)[0] for line in needed) == ["click", "mmengine", "torch"]


def with_wheel(installed, tmp_path, code):
    """The lines that code prints with the installed package in place of the repository's."""
    code = f"import detloss_plugins; assert detloss_plugins.__file__.startswith({str(installed)!r})\n{code}"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return run(sys.executable, "-c", code, cwd=tmp_path, env=env).splitlines()


HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = {"mmdet", "mmcv", "mmrotate", "ultralytics", "torchvision", "sklearn", "scipy", "pycocotools"}
        return None if name in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


@pytest.mark.slow
def test_the_command_works_with_torch_and_mmengine_only(installed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDING, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(installed)])}

    def detloss(*words, status=0):
        command = [sys.executable, str(installed / "bin" / "detloss"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
        assert done.returncode == status, done.stderr
        return (done.stderr if status else done.stdout).strip()

    assert detloss("--version").endswith(detloss_plugins.__version__)
    assert len(detloss("list").splitlines()) == 1 + len(registered_losses())
    assert "DIoU plus `alpha * v`" in detloss("show", "CIoULoss", "--plot", "ciou.png")
    assert (tmp_path / "ciou.png").stat().st_size > 10_000
    assert detloss("check", "CIoULoss").endswith("nothing is amiss")
    assert f"{len(registered_losses())} losses" in detloss("check", "--report")
    ultralytics = "error: Ultralytics is not installed: pip install 'detloss_plugins[ultralytics]'."
    for words in (["train"], ["check", "qfl"], ["ablate", "CIoULoss"]):
        assert detloss(*words, status=1) == ultralytics
    config = "retinanet_r18_fpn_digits"
    with_config = (["train", config], ["check", config], ["calibrate", config], ["ablate", "GHMC", "--model", config])
    for words in (*with_config, ["compare"]):
        assert detloss(*words, status=1).startswith("error: MMDetection is not installed: pip install ")


@pytest.mark.slow
def test_the_wheel_builds_every_loss(installed, tmp_path):
    code = (
        "from detloss_plugins.registry import build_loss, registered_losses\n"
        "for name, cls in registered_losses().items():\n"
        "    print(type(build_loss(dict(type=name, **cls.facts.example))).__name__)\n"
    )
    assert with_wheel(installed, tmp_path, code) == [*registered_losses()]


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_wheel_finds_and_loads_every_config(framework, installed, tmp_path):
    host, read = READ[framework]
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed")
    code = (
        "from detloss_plugins.configs import find, names\n"
        f"{read}\n"
        f"for name in names({framework!r}):\n"
        "    path = str(find(name))\n"
        f"    assert path.startswith({str(installed)!r}), path\n"
        "    print(name, read(path, *(task for task in ('obb', 'rtdetr') if task in name)) != {})\n"
    )
    lines = [line for line in with_wheel(installed, tmp_path, code) if line.endswith((" True", " False"))]
    assert lines == [f"{name} {name != 'stock'}" for name in names(framework)]  # the stock losses are no loss of ours
