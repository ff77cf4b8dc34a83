"""torchvision's operators in place of mmcv's: the same values and gradients, and detectors that train with them.

Where there is only mmcv-lite, run these with DETLOSS_LITE=1 in the environment.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.commands import ROOT, last_line, python, train

from detloss_plugins.adapters.mmdetection import lite

CONFIGS = ROOT / "configs" / "mmdetection"
# In a process that begins with this there is no compiled mmcv.
NOT_COMPILED = """
import sys
class Block:
    def find_spec(name, path=None, target=None):
        if name == "mmcv._ext":
            raise ModuleNotFoundError("No module named 'mmcv._ext'", name=name)
sys.meta_path.insert(0, Block)
"""


def is_compiled():
    """Whether mmcv has its operators in this environment."""
    return getattr(sys.modules.get(lite.NAME), "__file__", None) is not None


@pytest.fixture
def both(monkeypatch):
    """Calls a function with mmcv's operators and with the stand-in's."""
    if not is_compiled():
        pytest.skip("mmcv is not compiled here, so there is nothing to compare with")

    def call(function):
        theirs = function()
        with monkeypatch.context() as patch:
            stand_in = lite.StandIn()
            for name, module in [*sys.modules.items()]:
                if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
                    patch.setattr(module, "ext_module", stand_in)
            return function(), theirs

    return call


@pytest.fixture
def stand_in(monkeypatch):
    """``mmcv.ops`` with the operators of the stand-in."""
    ops = pytest.importorskip("mmcv.ops")
    for name, module in [*sys.modules.items()]:
        if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
            monkeypatch.setattr(module, "ext_module", lite.StandIn())
    return ops


def boxes(n, seed=0, whole=False):
    """``(n, 4)`` boxes in an image of 100 pixels and their scores; ``whole`` pixels give IoUs equal to a threshold."""
    generator = torch.Generator().manual_seed(seed)
    corner, sides = torch.rand(2, n, 2, generator=generator) * torch.tensor([70.0, 30.0]).view(2, 1, 1)
    found = torch.cat([corner, corner + sides], 1)
    return (found.round() if whole else found), torch.rand(n, generator=generator)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("whole", [True, False])
def test_nms(both, offset, threshold, whole):
    from mmcv.ops import nms

    ours, theirs = both(lambda: nms(*boxes(400, whole=whole), threshold, offset=offset, score_threshold=0.1))
    assert 20 < len(ours[1]) < 400
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0], theirs[0])


def test_nms_keeps_a_box_with_just_the_threshold(both):
    from mmcv.ops import nms

    pair = torch.tensor([[0.0, 0, 10, 10], [0, 0, 6, 10]])  # an IoU of 0.6
    ours, theirs = both(lambda: nms(pair, torch.tensor([0.9, 0.8]), 0.6))
    assert ours[1].tolist() == theirs[1].tolist() == [0, 1]


def test_nms_of_nothing(both):
    from mmcv.ops import nms, soft_nms

    for function in nms, soft_nms:
        ours, theirs = both(lambda function=function: function(torch.zeros(0, 4), torch.zeros(0), 0.5))
        assert ours[0].shape == theirs[0].shape
        assert ours[1].dtype == theirs[1].dtype == torch.long


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(both, method, offset):
    from mmcv.ops import soft_nms

    found, scores = boxes(300)
    ours, theirs = both(lambda: soft_nms(found, scores, 0.3, 0.5, 0.05, method, offset))
    assert 20 < len(ours[1]) < 300
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def with_gradients(function, *tensors):
    """What a function gives, and the gradients of the tensors for an output that is not contiguous."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*tensors)
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape[::-1]).permute(3, 2, 1, 0)
    output.backward(weight)
    return [output.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align(both, sampling_ratio, aligned):
    from mmcv.ops import RoIAlign

    features = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    rois = torch.cat([torch.arange(30.0).remainder(2).unsqueeze(1), boxes(30)[0]], 1)
    layer = RoIAlign((5, 4), 0.25, sampling_ratio, aligned=aligned)
    ours, theirs = both(lambda: with_gradients(lambda x: layer(x, rois), features))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(tensor.abs().sum() > 1 for tensor in ours)


@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_convolution(both, groups):
    from mmcv.ops import deform_conv2d

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, 36, 5, 8), (6, 4 // groups, 3, 3)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = both(
        lambda: with_gradients(lambda *t: deform_conv2d(*t, (2, 1), (1, 2), (1, 2), groups, 2), *tensors)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_modulated_deformable_convolution(both, groups, bias):
    from mmcv.ops import modulated_deform_conv2d

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, 36, 5, 8), (2, 18, 5, 8), (6, 4 // groups, 3, 3), (6,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes][: 5 if bias else 4]
    ours, theirs = both(
        lambda: with_gradients(
            lambda *t: modulated_deform_conv2d(*t, *([] if bias else [None]), (2, 1), (1, 2), (1, 2), groups, 2),
            *tensors,
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_focal_loss(stand_in):
    """Of mmcv's there is a form for a GPU only; the plain one is mmdet's."""
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator) * 3, torch.randint(8, (50,), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, 8)[:, :7]
    of_class = torch.arange(1.0, 8)
    foreground = labels < 7

    def value_and_gradient(function):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        return leaf.grad

    ours = value_and_gradient(lambda x: stand_in.sigmoid_focal_loss(x, labels, 1.5, 0.3, None, "sum"))
    plain = value_and_gradient(lambda x: py_sigmoid_focal_loss(x, one_hot, None, 1.5, 0.3, "sum"))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    got = stand_in.sigmoid_focal_loss(logits[foreground], labels[foreground], 1.5, 0.3, of_class, "none")
    want = py_sigmoid_focal_loss(logits[foreground], one_hot[foreground], None, 1.5, 0.3, "none")
    torch.testing.assert_close(got, want * of_class[labels[foreground], None], rtol=1e-5, atol=1e-6)


def test_any_other_operator_says_so(stand_in):
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(lite.MissingOperatorError, match=r"softmax_focal_loss_forward .* install the compiled mmcv"):
        stand_in.softmax_focal_loss(logits, labels, 2.0, 0.25, None, "none")
    layer = stand_in.RoIAlign(2, pool_mode="max")
    with pytest.raises(lite.MissingOperatorError, match="pool_mode='max'"):
        layer(torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]))


def test_compiled_operators_are_kept():
    if not is_compiled():
        pytest.skip("mmcv is not compiled here")
    with pytest.warns(UserWarning, match=r"compiled and are used: --lite was not needed\.$"):
        lite.install()
    assert is_compiled()


STEP = """
import json
from support.mmdetection import CONFIG_DIR, backward, build, digits_batch, small
from mmengine.registry import DefaultScope
with DefaultScope.overwrite_default_scope("mmdet"):
    losses = backward(build(small(CONFIG_DIR / "faster-rcnn_r18_fpn_digits.py")), digits_batch())
print(json.dumps({"ext": hasattr(sys.modules["mmcv._ext"], "__file__"), **{k: v.item() for k, v in losses.items()}}))
"""


def step(*lines):
    """The losses of a training step of Faster R-CNN in a process that begins with these lines."""
    path = f"sys.path[:0] = {[str(ROOT / name) for name in ('tests', 'tools')]}"
    return json.loads(python("-c", "\n".join(["import sys, os", path, *lines, STEP])).splitlines()[-1])


@pytest.mark.slow
def test_a_detector_has_the_same_losses():
    if not is_compiled():
        pytest.skip("mmcv is not compiled here, so there is nothing to compare with")
    opt_in = "os.environ['DETLOSS_LITE'] = '1'; import detloss_plugins.adapters.mmdetection"
    ours, theirs = step(NOT_COMPILED, opt_in), step()
    assert (ours.pop("ext"), theirs.pop("ext")) == (False, True)
    assert len(ours) >= 5
    assert ours == pytest.approx(theirs, rel=1e-5)


def command(tmp_path, *arguments):
    """``detloss train`` where mmcv is not compiled: its exit status and what it wrote to standard error."""
    words = [str(word) for word in (*arguments, "--work-dir", tmp_path)]
    code = f"{NOT_COMPILED}\nfrom detloss_plugins.cli import main\nmain({['train', *words]})"
    environment = {key: value for key, value in os.environ.items() if key != "DETLOSS_LITE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stderr


def test_the_command_without_the_option(tmp_path):
    status, error = command(tmp_path, CONFIGS / "atss_r18_fpn_digits.py")
    assert status == 1
    assert error.splitlines()[-1].endswith("install mmcv with them, or give --lite.")
    assert "Traceback" not in error


@pytest.mark.slow
def test_the_command_with_an_operator_that_is_missing(tmp_path):
    roi_layer = "model.roi_head.bbox_roi_extractor.roi_layer.pool_mode=max"
    status, error = command(tmp_path, CONFIGS / "faster-rcnn_r18_fpn_digits.py", "--lite", roi_layer)
    assert status == 1
    assert "roi_align with pool_mode='max'" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_the_option_is_for_mmdetection(capsys):
    said = last_line(capsys, "train", ROOT / "configs" / "ultralytics" / "qfl.yaml", "--lite", status=2)
    assert said.endswith("--lite is for MMDetection, so for a .py config")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "atss", "faster-rcnn"])
def test_training(name, tmp_path):
    """Four epochs, a third of what the config wants."""
    if is_compiled():
        pytest.skip("mmcv is compiled here: this is for an environment with mmcv-lite")
    config = CONFIGS / f"{name}_r18_fpn_digits.py"
    epochs = [f"train_cfg.{key}=4" for key in ("max_epochs", "val_interval")]
    map50, printed = train(tmp_path, config, "--lite", *epochs)
    assert map50 > 0.1
    assert "bbox_head.loss_bbox" in printed
