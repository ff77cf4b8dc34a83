"""What the tests of each adapter share; a framework is imported when a test asks for something of it."""

import copy

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(scope="module")
def mmdet_scope():
    """The default scope of every mmdet config, under which a bare loss name means mmdet's class."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture(scope="session")
def batch():
    """A batch of digits for MMDetection's detectors."""
    from support.mmdetection import digits_batch

    with DefaultScope.overwrite_default_scope("mmdet"):
        return digits_batch()


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """For each task of Ultralytics a small data set."""
    from support.ultralytics import build_datasets

    return build_datasets(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def batches(datasets, tmp_path_factory):
    """A training batch for each task as its real data loader makes it."""
    from support.ultralytics import real_batch

    return {task: real_batch(task, path, tmp_path_factory.mktemp("batch")) for task, path in datasets.items()}


@pytest.fixture(scope="session")
def warm(batches):
    """A model after some steps of stock training: at first the assigner's scores, the targets, grow from nothing."""
    from support.ultralytics import detector, steps, stock_criterion

    model = copy.deepcopy(detector("yolov8n"))
    steps(model, stock_criterion(model), batches["detect"], 60)
    return model
