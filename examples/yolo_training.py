# %% [markdown]
# # Ultralytics: train with other losses
#
# One dict names the losses. Slots that it leaves out keep the stock loss, and a misspelt name fails before any data is
# read. Here the data is the embedded digits set and training is short; put your own `data.yaml` and arguments in.

# %%
from pathlib import Path

from ultralytics import YOLO

from detloss_plugins import build_loss
from detloss_plugins.adapters.ultralytics import make_trainer, trained_losses
from detloss_plugins.testing.digits import build_digits

losses = {
    "cls": {"type": "VarifocalLoss", "loss_weight": 4.0},
    "box": {"type": "EfficientIoULoss"},
}
data = build_digits() / "digits.yaml"

# %% [markdown]
# `make_trainer` is all that is new; the rest is Ultralytics'. It says at the start which losses are active.

# %%
model = YOLO("yolov8n.yaml")
metrics = model.train(
    data=str(data),
    trainer=make_trainer(losses),
    epochs=2,
    imgsz=128,
    batch=16,
    optimizer="AdamW",
    lr0=0.002,
    mosaic=0.0,
    fliplr=0.0,
    plots=False,
    workers=0,
    pretrained=False,
    project=str(Path("runs").resolve()),
    name="yolo_training",
)
print(f"mAP50 {metrics.box.map50:.3f} after two epochs")

# %% [markdown]
# The checkpoint holds stock classes only, so it loads where `detloss_plugins` is not installed. It records the losses,
# with the weights that were used.

# %%
best = model.trainer.best
for slot, loss in trained_losses(best)["losses"].items():
    print(f"{slot}: {build_loss(loss)}")
print(f"a {type(YOLO(best).model).__name__} of Ultralytics")
