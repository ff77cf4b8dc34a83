"""Ablations: trainings with losses beside the stock ones, over models, data sets and seeds, and what came out.

``detloss ablate`` and ``detloss report`` are this package's commands. From Python::

    runs = plan({"vfl": {"type": "VarifocalLoss", "loss_weight": 4.0}}, ["yolov8n.yaml"], ["digits"], seeds=[0, 1, 2])
    study = Study("runs/ablation")
    study.add(runs)
    study.train(runs, jobs=2)
    write_report([study.results()], study.folder)

The trainings need Ultralytics or MMDetection, and pycocotools for the average precision by size.
"""

from detloss_plugins.ablation.grid import Run, plan
from detloss_plugins.ablation.report import read_results, write_report
from detloss_plugins.ablation.study import Study

__all__ = ["Run", "Study", "plan", "read_results", "write_report"]
