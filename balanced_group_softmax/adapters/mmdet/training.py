"""What trains, and where it starts: two hooks, and the functions behind them."""

from typing import Any, Literal, get_args

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from balanced_group_softmax.adapters.freezing import freeze_all_but
from balanced_group_softmax.adapters.mmdet.checks import check_categories, check_detector
from balanced_group_softmax.adapters.mmdet.loss import MMDetBAGSLoss, bags_losses
from balanced_group_softmax.head import BAGSHead

__all__ = ["SELECTP", "FreezeHook", "StartHook", "Train", "freeze", "start_from_softmax"]

Train = Literal["classifier", "box_head", "box_and_mask_heads", "all"]
SELECTP: dict[int, Train] = {
    0: "all",
    1: "classifier",
    2: "box_head",
    3: "classifier",
    4: "box_and_mask_heads",
}
"""The original's numbers for what trains; 1 is for one box head, 3 for the stages of a cascade."""


def freeze(model: nn.Module, train: Train | int = "classifier") -> list[nn.Parameter]:
    """Let only a part of a two-stage detector train, and keep the rest in eval mode.

    Args:
        model: the detector, not wrapped.
        train: `"classifier"` (`fc_cls`, of every stage), `"box_head"`, `"box_and_mask_heads"` or
            `"all"`, or the original's number for it, `selectp`: 1 (`fc_cls` of one box head), 2
            (box head), 3 (`fc_cls` of every stage of a cascade), 4 (box and mask heads), 0 (all).

    Returns:
        The parameters that train.

    Raises:
        TypeError: `model` is no two-stage detector.
        ValueError: `train` is unknown or does not fit the detector.
    """
    roi_head = getattr(model, "roi_head", None)
    box_head = getattr(roi_head, "bbox_head", None)
    if not isinstance(box_head, nn.Module):
        raise TypeError(
            "Expected `model` to be a two-stage detector of mmdet with `roi_head.bbox_head`, got "
            f"{type(model).__name__}"
        )
    stages = list(box_head) if isinstance(box_head, nn.ModuleList) else [box_head]
    if isinstance(train, int) and not isinstance(train, bool):
        if train not in SELECTP:
            raise ValueError(f"Expected `train` of the original's numbers 0 to 4, got {train}")
        if (train == 1 and len(stages) > 1) or (train == 3 and len(stages) == 1):
            raise ValueError(
                f"Expected 1 for one box head and 3 for a cascade, got {train} for {len(stages)} "
                "box heads; 'classifier' is for both"
            )
        train = SELECTP[train]
    if train not in get_args(Train):
        raise ValueError(f"Expected `train` to be one of {get_args(Train)}, got {train!r}")
    modules: list[Any] = [model]
    if train == "classifier":
        modules = [getattr(stage, "fc_cls", None) for stage in stages]
        if not all(isinstance(module, nn.Module) for module in modules):
            raise ValueError(
                "Expected box heads with a classifier `fc_cls` for 'classifier', got "
                f"{type(stages[0]).__name__}"
            )
    elif train == "box_head":
        modules = stages
    elif train == "box_and_mask_heads":
        mask_head = getattr(roi_head, "mask_head", None)
        if not isinstance(mask_head, nn.Module):
            raise ValueError("Expected a detector with mask heads for 'box_and_mask_heads'")
        modules = [*stages, *(mask_head if isinstance(mask_head, nn.ModuleList) else [mask_head])]
    return freeze_all_but(model, modules)


@HOOKS.register_module(name="BAGSFreezeHook")
class FreezeHook(Hook):
    """Freezes before training what does not train, and checks that BAGS can serve.

    Registered as `BAGSFreezeHook`. Before the first step, after weights are loaded: `freeze`,
    `check_detector`, and for each BAGS loss `check_categories` of the training data.

    Args:
        train: as for `freeze`.
    """

    priority = "VERY_HIGH"

    def __init__(self, train: Train | int = "classifier") -> None:
        self.train = train

    def before_train(self, runner: Any) -> None:
        """Freeze and check; a wrapper for several processes is made anew, since it looks once."""
        wrapped = is_model_wrapper(runner.model)
        model = runner.model.module if wrapped else runner.model
        trained = freeze(model, self.train)
        check_detector(model)
        for loss in bags_losses(model):
            check_categories(runner.train_dataloader.dataset, loss.layout)
        if wrapped:
            runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)
        number = sum(parameter.numel() for parameter in trained)
        runner.logger.info(f"BAGSFreezeHook: {self.train!r} trains, {number} parameters")


def start_from_softmax(state_dict: dict[str, Any], model: nn.Module) -> int:
    """Make group logits of the softmax classifiers in a checkpoint, as `BAGSHead.from_linear` does.

    Without it mmdet drops `fc_cls` of a plain detector, whose width differs, with a warning, and
    BAGS starts from random weights, as in the original.

    Args:
        state_dict: of the detector with plain softmax; its `fc_cls` are replaced.
        model: the detector with BAGS losses.

    Returns:
        How many classifiers were replaced; those of the layout's width stay as they are.

    Raises:
        ValueError: a classifier is neither as wide as the labels nor as the logits.
    """
    replaced = 0
    for name, module in model.named_modules():
        loss = getattr(module, "loss_cls", None)
        weight = state_dict.get(f"{name}.fc_cls.weight")
        if not isinstance(loss, MMDetBAGSLoss) or weight is None:
            continue
        layout, bias = loss.layout, state_dict.get(f"{name}.fc_cls.bias")
        rows, width = len(weight), module.fc_cls.in_features
        if rows == layout.num_logits:
            continue
        if rows != layout.num_labels:
            raise ValueError(
                f"Expected `{name}.fc_cls` of {layout.num_labels} rows, one for each label, or of "
                f"{layout.num_logits} logits, got {rows}"
            )
        shapes = [None if part is None else list(part.shape) for part in (weight, bias)]
        if shapes != [[rows, width], [rows]]:
            raise ValueError(
                f"Expected `{name}.fc_cls` with weight {[rows, width]} and bias {[rows]}, got "
                f"{shapes[0]} and {shapes[1]}"
            )
        linear = nn.Linear(width, rows)
        linear.load_state_dict({"weight": weight, "bias": bias})
        for kind, value in BAGSHead.from_linear(linear, layout).fc.state_dict().items():
            state_dict[f"{name}.fc_cls.{kind}"] = value
        replaced += 1
    return replaced


@HOOKS.register_module(name="BAGSStartHook")
class StartHook(Hook):
    """Starts BAGS from the trained classifier of `load_from`: `start_from_softmax`.

    Registered as `BAGSStartHook`. A checkpoint that has group logits already is left alone.
    """

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Change the checkpoint before its weights are copied."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        state_dict = checkpoint.get("state_dict", checkpoint)
        number = start_from_softmax(state_dict, model)
        runner.logger.info(f"BAGSStartHook: {number} classifiers start from plain softmax")
