"""The number of objects of each class in a data set of MMDetection, for ``class_weight="effective"``."""

from mmengine.hooks import Hook


def class_counts(dataset) -> list[int]:
    """How many objects of each class the annotations of a data set of mmengine's have, without those to be ignored."""
    counts = [0] * len(dataset.metainfo["classes"])
    for index in range(len(dataset)):
        for instance in dataset.get_data_info(index)["instances"]:
            counts[instance["bbox_label"]] += not instance.get("ignore_flag", 0)
    return counts


def count_for(model, runner) -> None:
    """Give the numbers of objects in the training set of a runner to the losses in a model that wait for them.

    Their weights are then on the device of the runner's model.
    """
    modules = (module for module in model.modules() if hasattr(module, "count_classes"))
    waiting = [loss for loss in modules if loss.class_weight == "effective" and loss.class_counts is None]
    if waiting:
        counts = class_counts(runner.train_dataloader.dataset)
        runner.logger.info(f"detloss_plugins: class weights by the effective numbers of {counts} objects")
        for loss in waiting:
            loss.count_classes(counts)
            loss.to(next(runner.model.parameters()).device)


class ClassCountsHook(Hook):
    """Counts the training set's objects, when a training begins, for losses with ``class_weight="effective"``.

    In a config, ``custom_hooks=[dict(type="detloss_plugins.adapters.mmdetection.ClassCountsHook")]``. It counts nothing
    where no loss waits for it; every rank counts the whole set.
    """

    # Before EMAHook copies the model in the same place: it pairs the buffers of the two by their order, and the weights
    # of classes are one more.
    priority = "VERY_HIGH"

    def before_run(self, runner) -> None:
        """Count, if it is a training: a test has no optimizer, or the config of one."""
        if hasattr(runner.optim_wrapper, "step"):
            count_for(runner.model, runner)
