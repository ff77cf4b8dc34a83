# %% [markdown]
# # A loss of your own
#
# A function is the equation: predictions and targets in, a loss of each box out, no reduction. Its keyword-only
# arguments are the settings, and what they are annotated with is what they may be. The class names the function;
# weight, `avg_factor`, reduction, half precision, chunks and `compile=True` come with it.

# %%
import torch
from torch import Tensor

from detloss_plugins import MODELS, build_loss
from detloss_plugins.facts import Share
from detloss_plugins.families import BoxLoss
from detloss_plugins.losses import giou_loss, iou_loss


def mixed_iou_loss(pred: Tensor, target: Tensor, *, share: Share = 0.5) -> Tensor:
    """``(1 - share) (1 - IoU) + share (1 - GIoU)`` of boxes ``(..., 4)`` as x1, y1, x2, y2."""
    return (1 - share) * iou_loss(pred, target, mode="linear") + share * giou_loss(pred, target)


@MODELS.register_module()
class MixedIoULoss(BoxLoss, fn=mixed_iou_loss, row_wise=True):
    """Between the IoU loss, which is flat where boxes are apart, and the GIoU loss."""


loss = build_loss(dict(type="MixedIoULoss", share=0.25, loss_weight=2.0))
print(loss, loss(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[1.0, 1, 2, 2]])))  # 2 (3/4 x 1 + 1/4 x 3/2)

# %% [markdown]
# `check_loss` tries what the package promises of its own losses, and names the first promise that does not hold: finite
# values and gradients for boxes without area and for huge ones, half precision, empty input, ignored rows, weights and
# averages, state, compiling. It knows nothing of the paper: a number worked by hand does, such as the one above.

# %%
from detloss_plugins.testing import check_loss

check_loss(MixedIoULoss)
print("check_loss: every promise holds")

# %% [markdown]
# A setting that cannot be is refused in a sentence, also in a config.

# %%
try:
    MixedIoULoss(share=1.5)
except ValueError as error:
    print(error)

# %% [markdown]
# It goes where the package's own losses go: `{"box": {"type": "MixedIoULoss"}}` for Ultralytics, and
# `loss_bbox=dict(type="detloss_plugins.MixedIoULoss")` for MMDetection, in any program that imports its module.

# %%
from detloss_plugins.adapters.ultralytics import load_losses

print(load_losses({"box": {"type": "MixedIoULoss", "share": 0.25}}))
