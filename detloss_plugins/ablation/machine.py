"""What a training runs on and with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from detloss_plugins.ablation.mmdetection import is_config


def versions(model: str) -> dict[str, str]:
    """Versions of Python and of what trains a model."""
    import detloss_plugins

    found = {"detloss_plugins": detloss_plugins.__version__, "python": platform.python_version()}
    for name in ("torch", *(("mmdet", "mmcv") if is_config(model) else ("ultralytics",))):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def count_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """This machine in words."""
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(count_gpus())]
    return ", ".join([f"{count_cores()} cores", platform.machine(), platform.system(), *gpus])
