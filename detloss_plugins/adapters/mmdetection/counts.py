"""The number of objects of each class in a data set of MMDetection, for ``class_weight="effective"``."""

from mmengine.hooks import Hook


def class_counts(dataset) -> list[int]:
    """How many objects of each class the annotations of a data set of mmengine's have, without those to be ignored."""
    counts = [0] * len(dataset.metainfo["classes"])
    for index in range(len(dataset)):
        for instance in dataset.get_data_info(index)["instances"]:
            counts[instance["bbox_label"]] += not instance.get("ignore_flag", 0)
    return counts


class ClassCountsHook(Hook):
    """Counts the training set's objects, when a training begins, for losses with ``class_weight="effective"``.

    In a config, ``custom_hooks=[dict(type="detloss_plugins.adapters.mmdetection.ClassCountsHook")]``. It counts nothing
    where no loss waits for it; every rank counts the whole set.
    """

    def before_train(self, runner) -> None:
        """Count."""
        modules = (module for module in runner.model.modules() if hasattr(module, "count_classes"))
        waiting = [loss for loss in modules if loss.class_weight == "effective" and loss.class_counts is None]
        if waiting:
            counts = class_counts(runner.train_dataloader.dataset)
            runner.logger.info(f"detloss_plugins: class weights by the effective numbers of {counts} objects")
            for loss in waiting:
                loss.count_classes(counts)
                loss.to(next(runner.model.parameters()).device)
