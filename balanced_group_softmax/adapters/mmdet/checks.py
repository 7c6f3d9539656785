"""What has to hold of a detector and its data before BAGS trains."""

from typing import Any

from mmdet.models.task_modules.samplers import OHEMSampler, ScoreHLRSampler
from torch import nn

from balanced_group_softmax.adapters.mmdet.loss import UNSERVED, MMDetBAGSLoss, bags_losses
from balanced_group_softmax.layout import GroupLayout

__all__ = ["check_categories", "check_detector"]


def check_detector(model: nn.Module) -> None:
    """Check that every head and sampler with a BAGS loss can work with it.

    Raises:
        ValueError: a head makes a classifier of its own, or a sampler wants the loss of each RoI.
    """
    for name, module in model.named_modules():
        loss = getattr(module, "loss_cls", None)
        if not isinstance(loss, MMDetBAGSLoss):
            continue
        width = getattr(getattr(module, "fc_cls", None), "out_features", None)
        if width != loss.layout.num_logits:
            raise ValueError(
                f"Expected `{name}.fc_cls` with the {loss.layout.num_logits} outputs of BAGSLoss, "
                f"got {type(module).__name__} with {width}: {UNSERVED}"
            )
    if bags_losses(model):
        sampler = getattr(getattr(model, "roi_head", None), "bbox_sampler", None)
        for one in sampler if isinstance(sampler, list) else [sampler]:
            if isinstance(one, OHEMSampler | ScoreHLRSampler):
                raise ValueError(
                    "Expected a sampler that works without the loss of each RoI, such as "
                    f"RandomSampler, got {type(one).__name__}"
                )


def check_categories(dataset: Any, layout: GroupLayout) -> None:
    """Check that a data set's labels follow ascending category ids, as a layout's do.

    mmdet numbers categories as they stand in the file. Data sets without `cat2label` are not
    looked at.

    Args:
        dataset: an mmdet data set, or a wrapper with `dataset`.
        layout: the groups.

    Raises:
        ValueError: other labels, or other categories than the layout's.
    """
    while not hasattr(dataset, "cat2label") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    labels = getattr(dataset, "cat2label", None)
    if labels is None:
        return
    ids = sorted(labels)
    if [labels[one] for one in ids] != list(range(layout.num_categories)):
        raise ValueError(
            f"Expected labels 0..{layout.num_categories - 1} in ascending order of category ids, "
            f"got {len(ids)} categories labelled in the order of {dataset.ann_file}; sort its "
            "categories by id"
        )
    if layout.category_ids is not None and tuple(ids) != layout.category_ids:
        missing = sorted(set(layout.category_ids) ^ set(ids))[:5]
        raise ValueError(
            f"Expected the category ids of the layout in {dataset.ann_file}, got others; the "
            f"first that only one of them has: {missing}"
        )
