"""Any test that asks for ``loss_cls`` runs once for every registered loss; ``--device`` moves them to a GPU."""

import os

import pytest
import torch
from compare import registered
from digits import digits_dir


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
        os.environ["DETLOSS_PLUGINS_CACHE"] = str(digits_dir().parent / worker)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


def pytest_generate_tests(metafunc):
    if "loss_cls" in metafunc.fixturenames:
        only = getattr(metafunc.function, "family", None)
        classes = {name: cls for name, cls in registered().items() if only in (None, cls.family)}
        metafunc.parametrize("loss_cls", classes.values(), ids=classes.keys())
