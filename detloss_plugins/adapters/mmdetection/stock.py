"""A config of mmdet's own losses for a detector that was trained with ours, which then runs where mmdet alone is."""

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.utils import get_object_from_string

from detloss_plugins.adapters.mmdetection.check import build_alone, build_detector, our_losses
from detloss_plugins.registry import SCOPE

# Of each family, a loss that makes a head of mmdet the same at inference.
STOCK = {
    "box": "GIoULoss",
    "classification": "CrossEntropyLoss",
    "distribution": "DistributionFocalLoss",
    "heatmap": "GaussianFocalLoss",
    "ranking": "CrossEntropyLoss",
    "region": "DiceLoss",
    "regression": "L1Loss",
    "soft label": "KnowledgeDistillationKLDivLoss",
}
# Of ours that a head looks at by name, as they say more of it than their family, and what of their settings it is.
BY_NAME = {"SeesawLoss": ("num_classes", "p", "q", "return_dict"), "SmoothL1Loss": (), "MSELoss": ()}
# Settings that MaskFormer's, Mask2Former's and DETR's head take out of the config of their class loss.
READ_FROM_CONFIG = ("class_weight", "bg_cls_weight")


class NotStockError(ValueError):
    """The detector needs this package at inference too; the message says what of it."""


def stock_config(cfg: Config) -> Config:
    """A copy of a config in which nothing is ours, for inference and tests with the checkpoint of a training.

    Losses of ours become ones of mmdet's that leave the channels and the scores as they are, and heads of ours their
    base in mmdet.

    Raises:
        NotStockError: if the detector has other layers than mmdet's, or scores otherwise.
    """
    stock = copy.deepcopy(cfg)
    for _, loss in our_losses(stock.model):
        made = _stock_loss(loss)
        loss.clear()
        loss.update(made)
    for part in _dicts(stock.model):
        if _is_ours(part):
            part.update(_stock_part(part))
            part.pop("self_balance_period", None)  # of RankingRetinaHead
    for key in ("custom_hooks", "custom_imports"):
        stock[key] = _without_ours(stock.get(key))
    layers, ours = _layers(stock), _layers(cfg)
    if layers != ours:
        raise NotStockError(f"mmdet's own detector has no {', '.join(sorted(ours.keys() ^ layers.keys())[:3])} ...")
    return stock


def _stock_loss(loss):
    built = build_alone(loss)
    name = type(built).__name__
    if built.family not in STOCK:
        raise NotStockError(f"mmdet has no loss like {name}.")
    made = {"type": f"mmdet.{name if name in BY_NAME else STOCK[built.family]}"}
    made |= {key: getattr(built, key) for key in BY_NAME.get(name, ())}
    if STOCK[built.family] == "CrossEntropyLoss" and name not in BY_NAME:
        made |= {"use_sigmoid": built.use_sigmoid}
        made |= {key: loss[key] for key in READ_FROM_CONFIG if isinstance(loss.get(key), float | list)}
        if getattr(built, "use_mask", False):
            made = {"type": "mmdet.CrossEntropyLoss", "use_mask": True}
    return made


def _is_ours(part):
    """Whether a dict configures something of this package."""
    return _path(part.get("type")).startswith(f"{SCOPE}.")


def _path(kind):
    """The name of what a config has as a type, which in lazy ones is a class."""
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _stock_part(part):
    """The type of mmdet's class that a head of ours adds nothing to at inference."""
    ours = get_object_from_string(_path(part["type"]))
    theirs = next(base for base in ours.__mro__ if base.__module__.startswith(("mmdet.", "torch.")))
    if not (ours.__name__.startswith(("Gathered", "Pixel")) or ours.__name__ == "RankingRetinaHead"):
        raise NotStockError(f"{ours.__name__} is more than mmdet's {theirs.__name__} at inference too.")
    return {"type": f"mmdet.{theirs.__name__}"}


def _layers(cfg):
    """The shapes of all that a detector keeps, but for the states of losses."""
    built = build_detector(cfg)
    state = built.state_dict()
    for name, module in built.named_modules():
        if type(module).__module__.startswith((f"{SCOPE}.losses", "mmdet.models.losses")):
            for key in module.state_dict():
                state.pop(f"{name}.{key}", None)
    own = ("box_balance", "balance_history")  # of RankingRetinaHead, for training
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith(own)}


def _dicts(node):
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from _dicts(child)


def _without_ours(entry):
    """``custom_hooks`` or ``custom_imports`` without those of this package."""
    if isinstance(entry, dict):
        imports = [name for name in entry.get("imports", []) if name.split(".")[0] != SCOPE]
        return {**entry, "imports": imports} if imports else None
    return [hook for hook in entry or [] if not _is_ours(hook)]


class StockConfigHook(Hook):
    """Writes :func:`stock_config` beside the checkpoints when a training begins, as ``NAME_stock.py``.

    In a config, ``custom_hooks=[dict(type="detloss_plugins.adapters.mmdetection.StockConfigHook")]``. Where mmdet alone
    is installed, ``init_detector("work_dirs/NAME/NAME_stock.py", "work_dirs/NAME/epoch_12.pth")`` then loads the
    detector; the log says so, or why that cannot be.
    """

    @master_only
    def before_train(self, runner) -> None:
        """Write the file."""
        path = Path(runner.work_dir) / f"{Path(runner.cfg.filename or 'config').stem}_stock.py"
        try:
            stock_config(runner.cfg).dump(path)
        except NotStockError as error:
            runner.logger.info(f"detloss_plugins is needed at inference too: {error}")
        except Exception as error:  # without which the training is what it was
            runner.logger.warning(f"No config for inference was written: {type(error).__name__} {error}")
        else:
            runner.logger.info(f"for inference where detloss_plugins is not installed: {path}")
