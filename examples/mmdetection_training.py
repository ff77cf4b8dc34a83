# %% [markdown]
# # MMDetection: train with other losses
#
# `type="detloss_plugins.NAME"` in any config is one of this package's losses; nothing has to be imported for it. The
# config is a RetinaNet of the package, for the embedded digits set; `Config.fromfile("your_config.py")` does as well.

# %%
from mmengine.config import Config
from mmengine.runner import Runner

from detloss_plugins.configs import find
from detloss_plugins.testing.digits import build_digits

build_digits()
cfg = Config.fromfile(find("retinanet_r18_fpn_digits"))
cfg.model.bbox_head.loss_cls = dict(type="detloss_plugins.QualityFocalLoss", use_sigmoid=True, loss_weight=1.0)
cfg.model.bbox_head.loss_bbox = dict(type="detloss_plugins.CIoULoss", loss_weight=2.0)
cfg.model.bbox_head.reg_decoded_bbox = True  # a box loss compares boxes, not encoded deltas

# %% [markdown]
# What does not suit is said before training: here a loss of another family than the slot's.

# %%
from detloss_plugins.adapters.mmdetection.check import check_config, our_losses

wrong = Config.fromfile(find("retinanet_r18_fpn_digits"))
wrong.model.bbox_head.loss_bbox = dict(type="detloss_plugins.FocalLoss", use_sigmoid=True)
print("\n".join(check_config(wrong)))
assert check_config(cfg) == []
for place, loss in our_losses(cfg.model):
    print(place, loss)

# %% [markdown]
# One epoch, in this process. Validation is as the config has it.

# %%
cfg.train_cfg.max_epochs = 1
cfg.train_dataloader.num_workers = cfg.val_dataloader.num_workers = 0
cfg.train_dataloader.persistent_workers = cfg.val_dataloader.persistent_workers = False
cfg.work_dir = "work_dirs/mmdetection_training"
runner = Runner.from_cfg(cfg)
runner.train()
print(type(runner.model.bbox_head.loss_cls), runner.iter, "iterations")
