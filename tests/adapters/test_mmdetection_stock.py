"""The config beside the checkpoints with which mmdet alone runs what was trained with our losses."""

import copy

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.models.dense_heads import GFLHead
from mmdet.models.losses import GIoULoss
from mmengine.config import Config
from mmengine.hooks import SyncBuffersHook
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from support.commands import python
from support.mmdetection import CONFIG_DIR, DIGITS, Interrupt, build, run, shrink, small

from detloss_plugins.adapters.mmdetection import (
    LossCurvesHook,
    NotStockError,
    PixelGFLHead,
    StockConfigHook,
    stock_config,
)
from detloss_plugins.losses import CIoULoss
from detloss_plugins.testing.digits import build_digits

pytestmark = pytest.mark.usefixtures("mmdet_scope")

# One config of each head, and what of ours the detector needs at inference.
CONFIGS = {
    "atss_r18_fpn_digits": "",
    "dino-4scale-qfl_r50_8xb2-12e_coco": "",
    "faster-rcnn_r50_fpn_1x_coco": "",
    "fcos_r50_fpn_1x_coco": "",
    "retinanet-alrp_r18_fpn_digits": "",
    "vfnet_r50_fpn_1x_coco": "",
    "atss-rs_r18_fpn_digits": "RankingATSSHead",
    "faster-rcnn-kl_r18_fpn_digits": "UncertaintyKLLoss",
    "faster-rcnn_r18_fpn_digits": "CornerBBoxCoder",
    "ssd_r18_digits": "PluginSSDHead",  # mmdet 3.3.0's own SSD head fails in prediction
    "yolov3_r18_digits": "PluginYOLOV3Head",
}
IMAGE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)


@pytest.mark.parametrize(("name", "needed"), CONFIGS.items())
def test_the_stock_detector_predicts_the_same(name, needed, batch):
    cfg = small(CONFIG_DIR / f"{name}.py")
    if needed:
        with pytest.raises(NotStockError, match=needed):
            stock_config(cfg)
        return
    if "test_cfg" in cfg.model and "max_per_img" in cfg.model.test_cfg:
        cfg.model.test_cfg.max_per_img = 50  # DINO takes as many whatever there is
    if "score_thr" in cfg.model.get("test_cfg", {}):
        cfg.model.test_cfg.score_thr = 0.0  # a new head is sure of nothing
    stock = stock_config(cfg)
    assert "detloss_plugins." not in stock.pretty_text
    ours, theirs = build(cfg).eval(), build(stock).eval()
    load_state_dict(theirs, ours.state_dict())
    data = ours.data_preprocessor(copy.deepcopy(batch), training=False)
    for sample in data["data_samples"]:
        sample.set_metainfo({"scale_factor": (1.0, 1.0)})
    with torch.no_grad():
        expected, found = (model(**data, mode="predict") for model in (ours, theirs))
    for one, other in zip(expected, found, strict=True):
        assert len(one.pred_instances)
        assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)
        assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)


def test_channels_of_seesaw_loss():
    cfg = shrink(get_config("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"))
    cfg.model.roi_head.bbox_head.loss_cls = dict(type="detloss_plugins.SeesawLoss", num_classes=10)
    stock = stock_config(cfg)
    assert stock.model.roi_head.bbox_head.loss_cls.type == "mmdet.SeesawLoss"
    assert build(stock).roi_head.bbox_head.fc_cls.out_features == 12


@pytest.mark.parametrize("name", ["detr/detr_r50_8xb2-150e_coco", "maskformer/maskformer_r50_ms-16xb1-75e_coco"])
def test_weights_of_classes_that_a_head_reads_from_the_config(name):
    """MaskFormer's, as Mask2Former's, cannot be built without, and DETR's makes them of two numbers."""
    cfg = get_config(f"mmdet::{name}.py")
    cfg.model.backbone.init_cfg = None
    head = cfg.model.get("panoptic_head", cfg.model.get("bbox_head"))
    for part in (cfg.model.get("encoder"), cfg.model.get("decoder"), head.get("transformer_decoder")):
        if part:
            part.num_layers = 1
    given = dict(head.loss_cls)
    head.loss_cls.type = "detloss_plugins.CrossEntropyLoss"
    stock = stock_config(cfg).model
    loss = stock.get("panoptic_head", stock.get("bbox_head")).loss_cls
    assert loss.type == "mmdet.CrossEntropyLoss"
    for key in ("class_weight", "bg_cls_weight"):
        assert loss.get(key) == given.get(key)


def test_a_config_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    """Whatever the reason, such as an operator that cannot be built a second time."""

    class Runner:
        work_dir, cfg = tmp_path, small(DIGITS)
        logger = __import__("logging").getLogger("stock")

    Runner.cfg.model.bbox_head.type = "NoHead"
    StockConfigHook().before_train(Runner)
    assert "No config for inference was written: KeyError" in caplog.text
    assert not list(tmp_path.iterdir())


def test_hooks_and_imports_of_ours_go():
    cfg = Config({**small(DIGITS), "custom_imports": dict(imports=["detloss_plugins", "json"])})
    cfg.custom_hooks = [dict(type="SyncBuffersHook"), dict(type="detloss_plugins.adapters.mmdetection.StockConfigHook")]
    stock = stock_config(cfg)
    assert stock.custom_imports.imports == ["json"]
    assert [hook.type for hook in stock.custom_hooks] == ["SyncBuffersHook"]
    cfg.custom_imports = dict(imports=["detloss_plugins"])
    assert stock_config(cfg).custom_imports is None


def test_a_config_with_classes_in_place_of_names():
    """Which mmengine's lazy configs have, without a default scope."""
    cfg = small(DIGITS)
    cfg.model.bbox_head.update(type=PixelGFLHead, loss_bbox=dict(type=CIoULoss))
    cfg.custom_hooks = [dict(type=SyncBuffersHook), dict(type=StockConfigHook), dict(type=LossCurvesHook)]
    random_numbers = torch.get_rng_state()
    stock = stock_config(cfg)
    assert torch.equal(torch.get_rng_state(), random_numbers), "rank 0 alone writes the config when a training begins"
    assert [hook.type for hook in stock.custom_hooks] == [SyncBuffersHook]
    with DefaultScope.overwrite_default_scope(None):
        head = MODELS.build(stock.model.bbox_head)
    assert type(head) is GFLHead
    assert type(head.loss_bbox) is GIoULoss


def test_init_detector_without_this_package(tmp_path):
    """A training's checkpoint and the file beside it, in a process that cannot import us; its detections are ours."""
    build_digits()
    hook = dict(type="detloss_plugins.adapters.mmdetection.StockConfigHook")
    runner = run(tmp_path, Interrupt(at=1), custom_hooks=[hook])
    file, checkpoint = tmp_path / "config_stock.py", tmp_path / "epoch_1.pth"
    np.save(tmp_path / "image.npy", IMAGE)
    python(
        "-c",
        f"""
import sys
for name in [name for name in sys.modules if name.startswith("detloss_plugins")]: del sys.modules[name]
sys.modules["detloss_plugins"] = None
import numpy, torch
from mmdet.apis import inference_detector, init_detector
model = init_detector({str(file)!r}, {str(checkpoint)!r}, device="cpu", cfg_options={{"model.test_cfg.score_thr": 0.0}})
found = inference_detector(model, numpy.load({str(tmp_path / "image.npy")!r})).pred_instances
torch.save((found.scores, found.bboxes), {str(tmp_path / "found.pt")!r})
""",
    )
    scores, boxes = torch.load(tmp_path / "found.pt", weights_only=True)
    cfg = Config(dict(runner.cfg))
    cfg.model.test_cfg.score_thr = 0.0
    own = inference_detector(init_detector(cfg, str(checkpoint), device="cpu"), IMAGE).pred_instances
    assert len(scores)
    torch.testing.assert_close((scores, boxes), (own.scores, own.bboxes))


def test_the_log_says_that_the_package_is_needed(tmp_path, caplog):
    class Runner:
        work_dir, cfg = tmp_path, small(CONFIG_DIR / "atss-rs_r18_fpn_digits.py")
        logger = __import__("logging").getLogger("stock")

    with caplog.at_level("INFO", "stock"):
        StockConfigHook().before_train(Runner)
    assert "needed at inference too: RankingATSSHead" in caplog.text
    assert not list(tmp_path.iterdir())
