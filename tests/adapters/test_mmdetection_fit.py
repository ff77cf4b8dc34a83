"""A loss that does not fit its head of MMDetection says so when the head is built; a config is checked before that."""

import copy
import re

import pytest
import torch
from mmdet.models.dense_heads import FreeAnchorRetinaHead, RetinaHead
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from support.mmdetection import CONFIG_DIR, config, shrink

from detloss_plugins.ablation.mmdetection import check_model
from detloss_plugins.adapters import heads
from detloss_plugins.adapters.mmdetection.calibrate import candidate
from detloss_plugins.adapters.mmdetection.check import build_alone, check_config, our_losses, unknown_keys
from detloss_plugins.cli.check import check_mmdet
from detloss_plugins.losses import CIoULoss, FocalLoss
from detloss_plugins.registry import build_loss, registered_losses

pytestmark = pytest.mark.usefixtures("mmdet_scope")

OURS = "detloss_plugins.adapters.mmdetection"
RANKING_HEAD = f"{OURS}.RankingRetinaHead"
HEADS = {
    **{name: {} for name in ("ATSSHead", "RetinaHead", "FCOSHead")},
    "RPNHead": {"num_classes": 1},
    RANKING_HEAD: {"reg_decoded_bbox": True},
}


def head(name, **options):
    losses = {key: value for key, value in options.items() if "loss" in key}
    prefixed = options | {slot: {**loss, "type": f"detloss_plugins.{loss['type']}"} for slot, loss in losses.items()}
    return MMDET_MODELS.build({"type": name, "num_classes": 80, "in_channels": 8, **HEADS.get(name, {}), **prefixed})


def settings(cls):
    """Of a loss without ``use_sigmoid``, which the user forgot."""
    return {"type": cls.__name__, **{key: value for key, value in cls.facts.example.items() if key != "use_sigmoid"}}


SIGMOID = [
    cls
    for cls in registered_losses().values()
    if cls.facts.family in ("classification", "ranking") and build_loss(settings(cls)).use_sigmoid
]


@pytest.mark.parametrize("name", ["ATSSHead", "RetinaHead", "FCOSHead", "RPNHead"])
@pytest.mark.parametrize("loss", SIGMOID, ids=lambda cls: cls.__name__)
def test_use_sigmoid_forgotten(name, loss):
    """The head would make a channel for the background, which a sigmoid loss does not know as such."""
    with pytest.raises(ValueError, match=f"Write use_sigmoid=True .* loss_cls of {name}.* {loss.__name__} is a loss"):
        head(name, loss_cls=settings(loss))


def test_use_sigmoid_where_there_is_a_softmax():
    assert not head("ATSSHead", loss_cls={"type": "FocalLoss", "use_sigmoid": False}).use_sigmoid_cls
    with pytest.raises(ValueError, match="use_sigmoid"):
        head("ATSSHead", loss_cls={"type": "ModifiedCrossEntropyLoss", "activation": "softmax", "use_sigmoid": True})


@pytest.mark.parametrize(
    ("name", "slot", "loss"),
    [
        ("RetinaHead", "loss_bbox", {"type": "FocalLoss", "use_sigmoid": True}),
        ("FCOSHead", "loss_bbox", {"type": "APLoss", "use_sigmoid": True}),
        ("ATSSHead", "loss_bbox", {"type": "DistributionFocalLoss"}),
        ("RetinaHead", "loss_cls", {"type": "DistributionFocalLoss"}),
        ("FCOSHead", "loss_cls", {"type": "CIoULoss"}),
        ("FCOSHead", "loss_centerness", {"type": "DIoULoss"}),
        ("Shared2FCBBoxHead", "loss_bbox", {"type": "CrossEntropyLoss"}),
        ("FCNMaskHead", "loss_mask", {"type": "GIoULoss"}),
    ],
)
def test_a_loss_of_another_family(name, slot, loss):
    with pytest.raises(ValueError, match=f"{slot} of {name} is no place for {loss['type']}"):
        head(name, **{slot: loss})


RANKING = [name for name, cls in registered_losses().items() if cls.facts.family == "ranking"]


@pytest.mark.parametrize("loss", RANKING)
def test_a_ranking_loss_goes_where_all_levels_are_called_at_once(loss):
    cfg = {"type": loss, "use_sigmoid": True}
    for name in ("RetinaHead", "ATSSHead", "DDODHead", "RPNHead", f"{OURS}.UncertaintyRetinaHead"):
        with pytest.raises(ValueError, match=f"called level by level, where {loss} .*RankingRetinaHead"):
            head(name, loss_cls=cfg)
    assert type(head("FCOSHead", loss_cls=cfg).loss_cls).__name__ == loss
    ranking = head(RANKING_HEAD, loss_cls=cfg, loss_bbox={"type": "GIoULoss"})
    assert type(ranking.loss_cls).__name__ == loss


SMALL = dict(feat_channels=32, stacked_convs=1)


@pytest.mark.parametrize(
    ("name", "slots", "reduction", "options"),
    [
        ("YOLOXHead", ("loss_cls", "loss_obj", "loss_bbox", "loss_l1"), "sum", SMALL),
        ("FSAFHead", ("loss_cls", "loss_bbox"), "none", {**SMALL, "reg_decoded_bbox": True}),
        ("YOLACTHead", ("loss_cls",), "none", {}),
        ("MultiInstanceBBoxHead", ("loss_cls",), "none", {"fc_out_channels": 8}),
    ],
)
def test_a_head_that_reduces_its_losses_by_itself(name, slots, reduction, options):
    """In YOLOX, a mean would be divided by the number of positives once more; the others would not train."""
    for slot in slots:
        kind = {"loss_bbox": "GIoULoss", "loss_l1": "L1Loss"}.get(slot, "CrossEntropyLoss")
        loss = {"type": kind, "reduction": reduction}
        if kind == "CrossEntropyLoss":
            loss["use_sigmoid"] = name not in ("YOLACTHead", "MultiInstanceBBoxHead")
        assert getattr(head(name, **{slot: loss}, **options), slot).reduction == reduction
        for other in {"none", "mean", "sum"} - {reduction}:
            with pytest.raises(ValueError, match=f'^Write reduction="{reduction}" in the config of {slot} of {name}'):
                head(name, **{slot: {**loss, "reduction": other}}, **options)
    if name == "YOLACTHead":
        assert head(name, loss_cls={**loss, "reduction": "mean"}, use_ohem=False).loss_cls.reduction == "mean"


FOCAL_LOSS, CIOU, BCE = (
    {"type": "FocalLoss", "use_sigmoid": True},
    {"type": "CIoULoss"},
    {"type": "CrossEntropyLoss", "use_sigmoid": True},
)
TOOD = {**SMALL, "num_dcn": 0, "anchor_type": "anchor_free"}


@pytest.mark.parametrize(
    ("name", "slot", "loss", "options"),
    [
        ("FreeAnchorRetinaHead", "loss_cls", FOCAL_LOSS, SMALL),
        ("AutoAssignHead", "loss_cls", FOCAL_LOSS, SMALL),
        ("AutoAssignHead", "loss_centerness", BCE, SMALL),
        ("RTMDetSepBNHead", "loss_centerness", BCE, {**SMALL, "share_conv": False}),
        ("TOODHead", "loss_centerness", BCE, TOOD),
        (f"{OURS}.PixelRepPointsHead", "loss_bbox", CIOU, {"point_feat_channels": 8, "stacked_convs": 1}),
        ("StageCascadeRPNHead", "loss_cls", BCE, {"with_cls": False, "num_classes": 1}),
        ("Shared2FCBBoxHead", "loss_bbox", {"type": "L1Loss"}, {"with_reg": False}),
    ],
)
def test_a_loss_that_the_head_never_calls(name, slot, loss, options):
    where = f"{slot} of {name.rpartition('.')[2]}"
    with pytest.raises(ValueError, match=f"^{loss['type']} has no effect as {where}, which the head never calls"):
        head(name, **{slot: loss}, **options)


def test_a_head_of_ones_own_may_call_what_its_base_leaves_out():
    class Mine(FreeAnchorRetinaHead):
        def loss_by_feat(self, *args):
            return {"loss_cls": self.loss_cls(*args)}

    assert type(Mine(80, 8, loss_cls={"type": "detloss_plugins.FocalLoss", "use_sigmoid": True}).loss_cls) is FocalLoss


def test_a_head_that_hands_over_probabilities():
    """TOOD's; of a loss that is made of others, each must take them."""
    taking = {**FOCAL_LOSS, "activated": True}
    quality = {"type": "QualityFocalLoss", "activated": True, "use_sigmoid": True}
    assert head("TOODHead", loss_cls=quality, **TOOD).loss_cls.activated
    assert head("TOODHead", loss_cls={"type": "SlideLoss", "base": taking, "use_sigmoid": True}, **TOOD).loss_cls
    write, take = "FocalLoss takes logits: write activated=True", "VarifocalLoss takes logits: take one with activated"
    varifocal = {"type": "VarifocalLoss", "use_sigmoid": True}
    joint = {"type": "JointLoss", "losses": [varifocal], "use_sigmoid": True}
    for loss, what in ((FOCAL_LOSS, write), (varifocal, take), (joint, take)):
        with pytest.raises(ValueError, match=f"^loss_cls of TOODHead is given probabilities, and {what}"):
            head("TOODHead", loss_cls=loss, **TOOD)
    assigner = {"type": "TaskAlignedAssigner", "topk": 13}
    phases = {"initial_epoch": 1, "initial_assigner": assigner, "assigner": assigner, "alpha": 1, "beta": 6}
    built = head("TOODHead", initial_loss_cls=taking, train_cfg=phases, **TOOD)
    assert built.initial_loss_cls.activated
    with pytest.raises(ValueError, match="initial_loss_cls of TOODHead is given probabilities"):
        head("TOODHead", initial_loss_cls=FOCAL_LOSS, train_cfg=phases, **TOOD)


@pytest.mark.parametrize("name", ["PAAHead", "LADHead"])
def test_a_head_that_adds_up_the_loss_of_each_class(name):
    for loss in (FOCAL_LOSS, BCE):
        assert head(name, loss_cls=loss, **SMALL).loss_cls.reduction == "mean"
    for loss in ("QualityFocalLoss", "EQLV2Loss", "APLoss"):
        with pytest.raises(
            ValueError, match=f"loss_cls of {name} is no place for {loss}, which has one loss an anchor"
        ):
            head(name, loss_cls={"type": loss, "use_sigmoid": True}, **SMALL)
    with pytest.raises(ValueError, match="is no place for CrossEntropyLoss"):
        head(name, loss_cls={**BCE, "use_sigmoid": False}, **SMALL)
    joint = {"type": "JointLoss", "use_sigmoid": True, "losses": [FOCAL_LOSS, {"type": "QualityFocalLoss"}]}
    with pytest.raises(ValueError, match="is no place for JointLoss"):
        head(name, loss_cls=joint, **SMALL)


def test_a_loss_by_its_path_is_one_of_ours(tmp_path, monkeypatch):
    code = "from detloss_plugins.losses import FocalLoss\nclass Mine(FocalLoss):\n    pass\n"
    (tmp_path / "losses_of_a_user.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"type": "losses_of_a_user.Mine"}
    cfg = {"bbox_head": {"loss_cls": mine, "loss_bbox": {"type": "mmdet.L1Loss"}, "loss_iou": {"type": "nowhere.Mine"}}}
    assert [where for where, _ in our_losses(cfg)] == ["bbox_head.loss_cls"]
    found = candidate(mine, head("RetinaHead", loss_bbox={"type": "GIoULoss"}))
    assert (found.slot, found.cfg["type"], found.cfg["use_sigmoid"]) == ("loss_cls", mine["type"], True)


def test_it_is_the_heads_of_mmdet_that_are_looked_at():
    class Ours(RetinaHead):
        pass

    options = dict(num_classes=80, in_channels=8)
    with pytest.raises(ValueError, match="loss_cls of Ours"):
        Ours(**options, loss_cls={"type": "detloss_plugins.FocalLoss"})
    mine = Ours(**options)
    with pytest.raises(ValueError, match="loss_bbox of Ours"):
        mine.loss_bbox = FocalLoss()
    mine.anything = FocalLoss()
    anybodys = torch.nn.Module()
    anybodys.loss_bbox = FocalLoss()
    anybodys.loss_cls = CIoULoss()


FOCAL = "model.bbox_head.loss_cls"
RETINANET = CONFIG_DIR / "retinanet_r18_fpn_digits.py"  # with gamma and alpha of a focal loss


def problems(overrides):
    cfg, stock = copy.deepcopy(config(RETINANET)), config(RETINANET)
    cfg.merge_from_dict(overrides)
    return check_config(cfg, stock, overrides)


def test_settings_that_another_loss_left():
    type_only = {f"{FOCAL}.type": "detloss_plugins.VarifocalLoss"}
    (found,) = problems(type_only)
    assert found.startswith(f"{FOCAL}: VarifocalLoss would keep gamma=2.0, alpha=0.25, which was written for FocalLoss")
    assert problems({**type_only, f"{FOCAL}.gamma": 2.0, f"{FOCAL}.alpha": 0.75}) == []
    assert problems({**type_only, f"{FOCAL}._delete_": True, f"{FOCAL}.use_sigmoid": True}) == []
    assert problems({f"{FOCAL}.type": "detloss_plugins.losses.FocalLoss"}) == [], "the same loss"
    assert problems({"model.bbox_head.loss_bbox.type": "detloss_plugins.CIoULoss"}) == [], "it left a loss_weight"


def test_settings_that_a_base_config_left(tmp_path):
    base, child, grandchild = (tmp_path / f"{name}.py" for name in ("base", "child", "grandchild"))
    config(RETINANET).dump(base)
    poly = "dict(type='detloss_plugins.PolyLoss', gamma=1.0)"
    child.write_text(f"_base_ = 'base.py'\nmodel = dict(bbox_head=dict(loss_cls={poly}))\n", encoding="utf-8")
    grandchild.write_text("_base_ = ['./child.py']\nmodel = dict(bbox_head=dict(num_classes=10))\n", encoding="utf-8")
    for path in (child, grandchild):
        (found,) = check_config(Config.fromfile(path))
        assert "PolyLoss would keep alpha=0.25, which was written for FocalLoss" in found
    new = "dict(_delete_=True, type='detloss_plugins.PolyLoss', use_sigmoid=True)"
    child.write_text(f"_base_ = 'base.py'\nmodel = dict(bbox_head=dict(loss_cls={new}))\n", encoding="utf-8")
    assert check_config(Config.fromfile(child)) == []


def test_a_config_is_checked_by_what_its_detector_says():
    (found,) = problems({f"{FOCAL}._delete_": True, f"{FOCAL}.type": "detloss_plugins.FocalLoss"})
    assert "Write use_sigmoid=True" in found
    (found,) = problems({f"{FOCAL}._delete_": True, f"{FOCAL}.type": "detloss_plugins.FocalLos"})
    assert "did you mean FocalLoss" in found
    state = torch.get_rng_state()
    assert problems({}) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_boxes_in_another_unit_are_no_error_and_are_said(tmp_path, monkeypatch):
    """By ``detloss check``, which lists them, and by ``detloss ablate`` before it trains."""
    monkeypatch.setattr(heads, "_told", set())
    path = tmp_path / "head.py"

    def write(loss):  # a config whose detector is a head alone
        box = {"type": f"detloss_plugins.{loss}"}
        model = dict(type="FCOSHead", num_classes=10, in_channels=8, norm_on_bbox=True, loss_bbox=box)
        rest = "train_dataloader = train_cfg = optim_wrapper = dict(batch_size=1)"
        path.write_text(f"default_scope = 'mmdet'\n{rest}\nmodel = {model!r}\n", encoding="utf-8")

    write("GIoULoss")
    assert check_mmdet(path).problems == []
    with pytest.warns(heads.MisfitWarning, match="NWDLoss is meant for pixels"):
        check_model(str(path), {"nwd": {"type": "NWDLoss"}})
    heads._told.clear()
    write("NWDLoss")
    (found,) = check_mmdet(path).problems
    assert "loss_bbox of FCOSHead hands over boxes in units" in found


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("epochs", "train_cfg.max_epochs"),
        ("foo", "did you mean"),
        ("cls.type", f"{FOCAL}.type"),
        ("model.bbox_head.los_cls.type", f"{FOCAL}.type"),
        ("train_dataloader.batchsize", "train_dataloader.batch_size"),
        ("model.test_cfg.score_th", "model.test_cfg.score_thr"),
    ],
)
def test_a_key_that_the_config_does_not_have(key, nearest):
    (found,) = unknown_keys(config(RETINANET), {key: 1})
    assert found.startswith(f"The config has no key {key}; ")
    assert nearest in found


def test_keys_that_are_new_and_right():
    """Of a class, and of mmengine's Runner; and of list items."""
    keys = ["train_dataloader.dataset.indices", f"{FOCAL}.loss_weight", "resume", "load_from", "launcher"]
    assert unknown_keys(config(RETINANET), dict.fromkeys([*keys, "train_cfg.max_epochs"])) == []
    assert unknown_keys(config(RETINANET), {"param_scheduler.0.end": 2}) == []
    for key, value, was in (
        ("train_cfg", 2, "a dict of "),
        ("resume", 2, "False"),
        (f"{FOCAL}.gamma", "a", 2),
    ):
        (found,) = unknown_keys(config(RETINANET), {key: value})
        assert re.match(f"{key} is {was}.* in the config, and cannot be {value!r}", found)
    (found,) = unknown_keys(config(RETINANET), {"param_scheduler.7.end": 2})
    assert "param_scheduler.7.end" in found


def test_our_losses_of_a_config():
    assert dict(our_losses(config(RETINANET).model)).keys() == {"bbox_head.loss_cls", "bbox_head.loss_bbox"}
    node = [{"type": CIoULoss}, {"type": "mmdet.CIoULoss"}, {"a": {"type": "detloss_plugins.losses.CIoULoss"}}]
    assert [path for path, _ in our_losses(node)] == ["0", "2.a"]


def test_weights_of_classes_that_detrs_head_makes_of_two_numbers():
    cfg = shrink(get_config("mmdet::detr/detr_r50_8xb2-150e_coco.py"))
    loss = cfg.model.bbox_head.loss_cls
    loss.type = "detloss_plugins.CrossEntropyLoss"
    assert loss.bg_cls_weight == 0.1
    assert check_config(cfg) == []
    assert build_alone(loss).loss_weight == 1
    loss.gamma = 2.0
    (found,) = check_config(cfg)
    assert "has no hyper-parameter 'gamma'" in found
    (found,) = problems({f"{FOCAL}.type": "detloss_plugins.FocalLoss", f"{FOCAL}.bg_cls_weight": 0.1})
    assert "has no hyper-parameter 'bg_cls_weight'" in found, "of another head"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_wrong_with_the_shipped_configs(path):
    assert check_config(Config.fromfile(path)) == []
