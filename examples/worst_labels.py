"""Find bad labels: train briefly, then list the objects whose labels cost the most in the class loss.

  uv run examples/worst_labels.py [--epochs 18]

Two labels of the digits set are broken on purpose, one class and one box: both are among the ten that are printed. What
a label costs is taken over its weight in the batch, as nothing fits a box in the wrong place, and little weighs little.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from ultralytics import YOLO

from detloss_plugins.adapters.ultralytics import make_trainer, per_image
from detloss_plugins.testing.digits import DIGITS_ARGS, build_digits

LOSSES = {"cls": {"type": "BinaryCrossEntropyLoss"}, "box": {"type": "CIoULoss"}}
BROKEN = {"0017": (0, "class"), "0203": (1, "box")}  # image -> which of its lines, and what is wrong with it


def break_labels(root):
    """Give one object another class and move another's box by half its width and height."""
    for image, (number, what) in BROKEN.items():
        file = root / "labels" / "train" / f"{image}.txt"
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        digit, x, y, w, h = map(float, lines[number])
        if what == "class":
            digit = (digit + 3) % 10
        else:
            x, y = (a + side / 2 if a < 0.5 else a - side / 2 for a, side in ((x, w), (y, h)))
        lines[number] = [f"{digit:g}", *(f"{a:.6f}" for a in (x, y, w, h))]
        file.write_text("\n".join(map(" ".join, lines)) + "\n", encoding="utf-8")


def costs_of_labels(trainer):
    """``(class loss, image file, number of the line, class)`` of every training label, without augmentation."""
    model = trainer.ema.ema.eval()
    criterion = model.init_criterion()
    loader = trainer.get_dataloader(trainer.data["train"], batch_size=16, rank=-1, mode="val")
    for batch in loader:
        batch = trainer.preprocess_batch(batch)
        with torch.no_grad():
            found = per_image(criterion, model(batch["img"]), batch)
        costs = found.objects["cls"] / found.weight.clamp(min=1e-9)
        images, lines = batch["batch_idx"].long().tolist(), {}
        for cost, image, label in zip(costs.tolist(), images, batch["cls"].view(-1).tolist(), strict=True):
            lines[image] = lines.get(image, -1) + 1
            yield cost, Path(batch["im_file"][image]), lines[image], int(label)


def main(argv=None):
    """Train, and print the ten labels that cost the most; returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=18)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        stock, root = build_digits(), Path(folder) / "digits"
        shutil.copytree(stock, root)
        config = root / "digits.yaml"
        config.write_text(config.read_text(encoding="utf-8").replace(str(stock), str(root)), encoding="utf-8")
        break_labels(root)
        yolo = YOLO("yolov8n.yaml")
        settings = {**DIGITS_ARGS, "epochs": args.epochs, "workers": 0}
        yolo.train(data=str(config), project=folder, trainer=make_trainer(LOSSES), seed=0, **settings)
        worst = sorted(costs_of_labels(yolo.trainer), reverse=True)[:10]
    for cost, file, line, label in worst:
        wrong = f"   its {BROKEN[file.stem][1]} is wrong" if BROKEN.get(file.stem, (None,))[0] == line else ""
        print(f"{cost:6.2f}  {file.name}, line {line + 1}: {label}{wrong}")
    return worst


if __name__ == "__main__":
    main()
