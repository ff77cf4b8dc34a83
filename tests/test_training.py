"""The main job and its bars, by the commands that users type. Minutes each, so they are slow."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import train

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_main_job(tmp_path):
    map50, printed = train(tmp_path / "run")
    assert map50 >= 0.7
    checkpoint = re.search(r"^checkpoint: (.*)$", printed, re.MULTILINE)[1]
    assert Path(checkpoint).exists()
    active = printed.split("active losses:")[1].split()
    assert active[0] == "cls:"
    assert active[1].startswith("AdaptiveThresholdFocalLoss")
    assert "MPDIoULoss(eps=1e-07," in active


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qfl", "focal", "ap", "alrp", "rank_sort", "dr"])
def test_class_losses_at_their_default_gain(tmp_path, name):
    map50, _ = train(tmp_path / "run", str(ROOT / "configs" / "ultralytics" / f"{name}.yaml"))
    assert map50 >= 0.5


@pytest.mark.slow
def test_compare_command_on_training_tensors():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "compare.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "PASS" in done.stdout
    assert "FAIL" not in done.stdout


def test_a_short_training_with_ultralytics(tmp_path):
    """A few images, one epoch: the command's own path, without the wait."""
    pytest.importorskip("ultralytics")
    assert "checkpoint" in train(tmp_path, "epochs=1", "fraction=0.04", "imgsz=64", "val=False")[1]


def test_a_short_training_with_mmdetection(tmp_path):
    pytest.importorskip("mmdet")
    config = str(ROOT / "configs" / "mmdetection" / "gfl_r18_fpn_digits.py")
    short = ["train_cfg.max_epochs=1", "train_dataloader.dataset.indices=16", "val_dataloader.dataset.indices=8"]
    printed = train(tmp_path, config, *short)[1]
    assert "bbox_head.loss_cls: QualityFocalLoss" in printed
    assert "epoch_1.pth" in printed
