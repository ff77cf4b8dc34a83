"""Losses with state in MMDetection: killed at any moment and resumed, and on ranks without objects now and then."""

import copy
import multiprocessing
import os
import random
import time

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dist import all_reduce_params
from mmengine.registry import DefaultScope
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData
from support.mmdetection import CONFIG_DIR, Interrupt, build, run, small
from support.ranks import two_ranks
from torch.nn.parallel import DistributedDataParallel

from detloss_plugins.registry import registered_losses
from detloss_plugins.testing.digits import build_digits

RETINANET, FASTER_RCNN = (CONFIG_DIR / f"{name}_r50_fpn_1x_coco.py" for name in ("retinanet", "faster-rcnn"))
MOMENTUM = {"GHMC": {"momentum": 0.75}, "GHMR": {"momentum": 0.7}, "SlideLoss": {"decay": 0.999}}
STATEFUL = [name for name, cls in registered_losses().items() if cls.make(**MOMENTUM.get(name, {})).state_dict()]
KILLS, EPOCHS = int(os.environ.get("DETLOSS_KILLS", "4")), 4  # 20 of them take minutes a loss


def detector(name):
    """The config of a small detector with that loss, and the path of the head that has it."""
    cls, cfg = registered_losses()[name], small(FASTER_RCNN if name == "SeesawLoss" else RETINANET).model
    head = cfg.roi_head.bbox_head if name == "SeesawLoss" else cfg.bbox_head
    slot = "loss_bbox" if cls.facts.family in ("box", "regression") else "loss_cls"
    settings = {**cls.facts.example, **MOMENTUM.get(name, {})}
    if slot == "loss_cls" and name != "SeesawLoss":
        settings["use_sigmoid"] = True
    if "num_classes" in cls.rules:
        settings["num_classes"] = 10
    settings["return_dict"] = True
    head[slot] = {"type": f"detloss_plugins.{name}", **{k: v for k, v in settings.items() if k in cls.rules}}
    if cls.facts.family == "regression":
        head.reg_decoded_bbox = False
    return cfg, f"{'roi_head.' if name == 'SeesawLoss' else ''}bbox_head.{slot}"


class Seeded(Interrupt):
    """Each step has a seed of its own: a checkpoint of mmengine's does not hold the state of the random numbers, and
    Faster R-CNN draws samples."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        set_random_seed(runner.iter)


def training(work_dir, model):
    """A run in this process, from its last checkpoint on."""
    torch.set_num_threads(1)
    loop = dict(type="EpochBasedTrainLoop", max_epochs=EPOCHS, val_interval=100)
    with DefaultScope.overwrite_default_scope("mmdet"):
        run(work_dir, Seeded(), model=model, resume=True, train_cfg=loop, randomness=dict(seed=0))


def start(work_dir, model):
    """The same in a process of its own, a copy of this one, so that nothing is imported again."""
    process = multiprocessing.get_context("fork").Process(target=training, args=(work_dir, copy.deepcopy(model)))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
def test_killed_at_any_moment_and_resumed(name, tmp_path):
    """As often as a training is killed, it ends where one that was left alone ends: weights, moments and states."""
    build_digits()
    model, path = detector(name)
    began = time.monotonic()
    alone = start(tmp_path / "alone", model)
    alone.join()
    whole = time.monotonic() - began
    last = f"epoch_{EPOCHS}.pth"
    expected = torch.load(tmp_path / "alone" / last, weights_only=False)
    assert any(key.startswith(f"{path}.") for key in expected["state_dict"]), "the state is in the checkpoint"
    moment, kills, runs = random.Random(name), 0, 0
    while kills < KILLS:
        folder, done = tmp_path / str(runs), False
        while not done:
            process = start(folder, model)
            process.join(moment.uniform(0.2, 1.0) * whole if kills < KILLS else None)
            done = process.exitcode == 0
            assert done or process.exitcode is None, "it failed by itself"
            kills += not done
            process.kill()
            process.join()
        runs += 1
        found = torch.load(folder / last, weights_only=False)
        for key in ("state_dict", "optimizer"):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)


def rank(number):
    """The states after each step of a detector for each loss, where any rank may have no object in a step."""
    boxes = torch.tensor([[10.0, 12, 58, 76], [60, 70, 110, 104]])
    image = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    shape = dict(img_shape=(128, 128), ori_shape=(128, 128), pad_shape=(128, 128))
    found = {}
    with DefaultScope.overwrite_default_scope("mmdet"):
        for name in STATEFUL:
            cfg, path = detector(name)
            model = build(Config({"model": cfg}))
            ranks = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
            loss, chance = model.get_submodule(path), random.Random(f"{name} {number}")
            states = []
            for _ in range(8):
                sample = DetDataSample(metainfo=shape)
                count = chance.choice([0, 0, 2])
                sample.gt_instances = InstanceData(bboxes=boxes[:count], labels=torch.arange(count))
                data = model.data_preprocessor({"inputs": [image] * 2, "data_samples": [sample] * 2}, training=True)
                total = model.parse_losses(ranks(**data, mode="loss"))[0]
                assert total.isfinite()
                total.backward()
                if not loss.facts.every_rank:
                    all_reduce_params(list(loss.buffers()), op="mean")  # as SyncBuffersHook does
                states.append(torch.cat([buffer.detach().flatten().float() for buffer in loss.buffers()]))
            found[name] = torch.stack(states)
    return found


@pytest.mark.slow
def test_ranks_that_have_no_objects_now_and_then(tmp_path):
    """Nobody waits for ever; the states are numbers, move, and are those of all ranks after every step."""
    first, second = two_ranks(rank, tmp_path)
    assert first.keys() == second.keys() == set(STATEFUL)
    for name, states in first.items():
        assert states.isfinite().all(), name
        assert (states[0] != states[-1]).any(), name
        torch.testing.assert_close(states, second[name])
