"""Tests of a host that is not installed are skipped, and a line at the end says so and what to install."""

import importlib.util

import pytest

HOSTS = {  # and what installs them
    "mmdet": "uv sync --all-groups",
    "ultralytics": "uv sync",
    "torchvision": "uv sync",
    "mmrotate": "uv run nox -s onedl",
}
MISSING = [host for host in HOSTS if importlib.util.find_spec(host) is None]
# Modules that import a host; a test elsewhere is skipped when it comes to import a missing one.
IMPORTS = {
    "*/adapters/mmdetection/*": ["mmdet"],
    "*/adapters/ultralytics/*": ["ultralytics"],
    "*/support/mmdetection*": ["mmdet"],
    "*/support/ultralytics*": ["ultralytics"],
    "*/test_mm*": ["mmdet"],
    "*/test_mmrotate*": ["mmrotate"],
    "*/test_combinations.py": ["ultralytics"],
    "*/test_detr_quality.py": ["mmdet"],
    "*/test_examples.py": ["ultralytics"],
    "*/test_ranks.py": ["mmdet", "ultralytics"],
    "*/test_table.py": ["mmdet", "ultralytics"],
    "*/test_tools.py": ["mmdet", "ultralytics"],
    "*/test_ultralytics*": ["ultralytics"],
    "*/test_uncertainty.py": ["ultralytics"],
}
collect_ignore = ["tests/typed.py"]  # mypy reads it, and calls in it are wrong on purpose
collect_ignore_glob = [pattern for pattern, hosts in IMPORTS.items() if not set(hosts).isdisjoint(MISSING)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skipping())


def _skipping():
    try:
        return (yield)
    except ModuleNotFoundError as error:
        host = (error.name or "").partition(".")[0]
        if host in MISSING:
            pytest.skip(f"{host} is not installed")
        raise


def pytest_terminal_summary(terminalreporter):
    for host in MISSING:
        terminalreporter.write_line(
            f"{host} is not installed, so its tests were left out; to install it: {HOSTS[host]}"
        )
