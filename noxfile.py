"""The versions that people have: a session a row of ``ROWS``, each in an environment of its own.

  uv run nox                       all rows, an hour
  uv run nox -s newest-yolo        one
  uv run nox -s table              the page docs/versions.md from the outcomes

A row writes its outcome to ``docs/versions.json``. A row whose Python is not installed is left out.
"""

import datetime
import json
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).parent
OUTCOMES = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False

CORE = ["detloss_plugins", "tests", "--ignore=tests/adapters"]
YOLO = [f"tests/adapters/test_ultralytics_{name}.py" for name in ("versions", "files")] + ["-m", "slow or not slow"]
LITE = ["tests/adapters/test_mmdetection_lite.py", "-m", "slow or not slow"]
WITH = [
    "pytest>=8.3",
    "pytest-xdist",
    "hypothesis",
    "scikit-learn",
    "rich",
    "click",
    "matplotlib",
    "cloudpickle",
    "setuptools<81",
]
# What mmdet needs beside mmengine and mmcv, whose forks have other names.
MMDET = ["pycocotools", "scipy", "shapely", "six", "terminaltables", "tqdm", "addict", "yapf", "pyyaml", "packaging"]
MMROTATE = ["imaug", "faster-coco-eval", "ninja", "psutil", "wheel"]
HOSTS = ["torch", "numpy", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmdetection", "mmrotate", "ultralytics"]


@dataclass(frozen=True)
class Row:
    """A stack: what is installed, and what is run on it."""

    python: str
    packages: list[str]
    tests: list[str]
    alone: tuple[str, ...] = ()  # packages installed without what they require
    build: tuple[str, ...] = ()  # and those that compile against the torch that is there
    lite: bool = False  # whether mmcv has no compiled operators


OLDEST = ["torch==2.1.2", "numpy==1.26.4", "mmengine==0.10.0"]
PINNED = ["torch==2.5.1", "torchvision==0.20.1", "mmengine==0.10.7"]
NEWEST = ["torch", "torchvision", "onedl-mmengine>=0.10.12"]
ROWS = {
    "oldest-core": Row("3.10", OLDEST, CORE),
    "compiling-core": Row("3.11", ["torch==2.4.1", "numpy<2", "mmengine==0.10.7"], CORE),
    "newest-core": Row("3.13", ["torch", "onedl-mmengine>=0.10.12"], CORE),
    "oldest-yolo": Row("3.10", [*OLDEST, "torchvision==0.16.2", "ultralytics==8.2.103"], YOLO),
    **{
        f"yolo-{version}": Row("3.11", [*PINNED, f"ultralytics=={version}"], YOLO)
        for version in ("8.3.0", "8.3.240", "8.4.0", "8.4.38", "8.4.140")
    },
    "newest-yolo": Row("3.13", [*NEWEST, "ultralytics"], YOLO),
    "oldest-mmdet": Row(
        "3.10",
        [*OLDEST, "torchvision==0.16.2", *MMDET],
        LITE,
        alone=("mmdet==3.0.0", "mmcv-lite==2.0.1"),
        lite=True,
    ),
    "lite": Row("3.13", [*NEWEST, *MMDET], LITE, alone=("mmdet==3.3.0", "mmcv-lite==2.1.0"), lite=True),
    # On torch 2.14 and newer the operators of the fork's mmcv do not compile.
    "onedl": Row(
        "3.12",
        ["torch==2.11.0", "torchvision==0.26.0", "onedl-mmengine==0.10.12", *MMDET, *MMROTATE],
        ["tests/adapters/test_mmdetection.py", "tests/adapters/test_mmrotate.py", "-m", "slow or not slow"],
        alone=("onedl-mmdetection==3.5.1", "onedl-mmrotate==1.2.1"),
        build=("onedl-mmcv==2.3.6",),
    ),
}


def outcomes():
    """What the rows gave when they were last run."""
    return json.loads(OUTCOMES.read_text(encoding="utf-8")) if OUTCOMES.exists() else {}


def install(session, row):
    """The stack of a row, our package without what it requires, and what the tests need."""
    session.install(*row.packages, "opencv-python-headless<5", *WITH)
    for package in row.build:
        session.install("--no-build-isolation", "--no-deps", package, env={"CFLAGS": "-O1 -g0", "MAX_JOBS": "2"})
    session.install("--no-deps", *row.alone, "--editable", ".")


def versions(session):
    """``{package: version}`` of those that matter."""
    listed = json.loads(
        session.run("uv", "pip", "list", "--format=json", silent=True, external=True, stderr=subprocess.DEVNULL)
    )
    return {p["name"]: p["version"] for p in listed if p["name"].removeprefix("onedl-") in HOSTS}


def run_row(session, name):
    """Install and test a row, and write down what came out."""
    row, report = ROWS[name], Path(session.create_tmp()) / "report.xml"
    install(session, row)
    passed = False
    try:
        session.env["YOLO_CONFIG_DIR"] = str(
            Path(session.create_tmp()).resolve()
        )  # versions reset one another's settings
        session.env["YOLO_OFFLINE"] = "true"
        session.env["DETLOSS_LITE"] = str(int(row.lite))
        session.run("pytest", "-q", "-n", "2", f"--junitxml={report}", *row.tests, *session.posargs)
        passed = True
    finally:
        if report.exists():
            suite = xml.parse(report).getroot()[0].attrib
            wrong = int(suite["failures"]) + int(suite["errors"])
            outcome = {
                "python": row.python,
                "versions": versions(session),
                "passed": int(suite["tests"]) - wrong - int(suite["skipped"]),
                "failed": wrong,
                "skipped": int(suite["skipped"]),
                "seconds": round(float(suite["time"])),
                "date": datetime.date.today().isoformat(),
            }
            found = {**outcomes(), name: outcome} if passed or wrong else outcomes()
            OUTCOMES.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


for _name, _row in ROWS.items():
    nox.session(lambda session, name=_name: run_row(session, name), name=_name, python=_row.python)


@nox.session(default=False, venv_backend="none")
def table(session):
    """Write docs/versions.md from docs/versions.json."""
    lines = [
        "# Versions",
        "",
        "Written by `uv run nox -s table` from the outcomes of `uv run nox`; the rows are those of `noxfile.py`.",
        "",
        "| row | Python | versions | passed | failed | skipped | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = outcomes()
    for name in ROWS:
        if name not in found:
            lines.append(f"| {name} | {ROWS[name].python} | not run | | | | |")
            continue
        row = found[name]
        stack = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
        counts = " | ".join(str(row[count]) for count in ("passed", "failed", "skipped"))
        lines.append(f"| {name} | {row['python']} | {stack} | {counts} | {row['date']} |")
    PAGE.write_text("\n".join([*lines, ""]), encoding="utf-8")
