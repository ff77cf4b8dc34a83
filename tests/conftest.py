"""Any test that asks for ``loss_cls`` runs once for every registered loss, or for those that ``support.only`` leaves;
``--device`` moves them to a GPU."""

import functools
import gc
import importlib
import os
import sys
import warnings
from pathlib import Path

import mmengine.config.config
import mmengine.config.utils
import pytest
import torch
from mmengine.logging import MessageHub

from detloss_plugins import engine
from detloss_plugins.registry import MODELS, registered_losses

# For each "mmdet::" in a config, mmengine reads the hundred files of mmdet's index again and reloads pkg_resources;
# and half of the time of a short training it would lay out the text of its config nicely, six times.
mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)
mmengine.config.config.is_installed = functools.cache(mmengine.config.config.is_installed)
mmengine.config.config.FormatCode = lambda text, **_: (text, False)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the losses are tested, such as cuda")


def pytest_configure():
    """Where tests run side by side: a share of the cores each, as threads that outnumber them wait for one another;
    and a data set each, as Ultralytics keeps its list of labels beside the data, a file that two trainings at once
    must not share."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        threads = max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that a test starts
        cache = os.environ.get("DETLOSS_PLUGINS_CACHE") or Path.home() / ".cache" / "detloss_plugins"
        os.environ["DETLOSS_PLUGINS_CACHE"] = str(Path(cache) / worker)


def pytest_collection_finish():
    """The frameworks collect garbage for each data set and training, and need not look through what is imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_runner_is_left_training():
    """A run that a test breaks off would go on being the one that trains, for every ScheduledLoss after it."""
    yield
    MessageHub.get_current_instance().pop_info("loop_stage", None)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


def pytest_generate_tests(metafunc):
    if "loss_cls" in metafunc.fixturenames:
        says = getattr(metafunc.function, "only", lambda facts: True)
        classes = {name: cls for name, cls in registered_losses().items() if says(cls.facts)}
        metafunc.parametrize("loss_cls", classes.values(), ids=classes.keys())


OWN_LOSS = """
from detloss_plugins import MODELS
from detloss_plugins.losses import GIoULoss

@MODELS.register_module()
class FiledLoss(GIoULoss):
    pass
"""


@pytest.fixture
def filed_loss(tmp_path, monkeypatch):
    """A registered loss of a user's own file, ``filed.py``; gives what forgets it, as another process never knew it."""
    (tmp_path / "filed.py").write_text(OWN_LOSS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("filed")

    def forget():
        sys.modules.pop("filed", None)
        MODELS.module_dict.pop("FiledLoss", None)

    yield forget
    forget()


@pytest.fixture
def traced(monkeypatch):
    """``torch.compile`` without a C++ compiler: everything up to the kernels, which would take seconds each."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stock = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options=None, **how: stock(f, backend="eager", **how))
    monkeypatch.setattr(engine, "_kernels", {})
    monkeypatch.setattr(engine, "_failed", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs uncompiled")
        yield
