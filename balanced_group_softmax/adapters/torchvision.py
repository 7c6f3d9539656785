"""Give a torchvision two-stage detector another box classifier, such as Balanced Group Softmax.

`convert_to_bags` and `convert_classifier` work on Faster, Mask and Keypoint R-CNN with any
backbone. They replace the one layer `model.roi_heads.box_predictor.cls_score`; `freeze` says what
then trains.

State dict: `roi_heads.box_predictor.cls_score.weight` and `.bias` give way to the entries of the
classifier under the same prefix (for `BAGSHead`: `cls_score.fc.weight`, `cls_score.fc.bias` and
`cls_score._extra_state`, which holds the layout). Every other key and tensor stays as it was.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.boxes import clip_boxes_to_image

from balanced_group_softmax.adapters.freezing import freeze_all_but
from balanced_group_softmax.adapters.protocol import Classifier, check_classifier
from balanced_group_softmax.detections import select_detections
from balanced_group_softmax.head import BAGSHead
from balanced_group_softmax.layout import GroupLayout

__all__ = ["ClassifierRoIHeads", "convert_classifier", "convert_to_bags", "freeze"]

Train = Literal["classifier", "box_head", "box_and_mask_heads", "all"]
_Model = TypeVar("_Model", bound=nn.Module)

_CLASSIFIER = "roi_heads.box_predictor.cls_score"
# torchvision drops boxes with a side below this, in pixels of the resized image.
_MIN_SIZE = 1e-2


class _Recorder(nn.Module):
    """Stands in for the box predictor during one training step; keeps logits and labels.

    `RoIHeads.forward` has no seam for a loss. It computes its own cross-entropy and picks each
    box's deltas by label; the recorder hands it two columns, background and foreground, with the
    deltas already picked. So the cross-entropy that is thrown away costs nothing, and
    class-agnostic deltas, which torchvision cannot train by itself, need no case of their own.
    """

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor
        self.labels = torch.empty(0, dtype=torch.int64)
        self.logits = torch.empty(0)

    def forward(self, box_features: Tensor) -> tuple[Tensor, Tensor]:
        self.logits, deltas = self.predictor(box_features)
        num_rois = len(deltas)
        deltas = deltas.reshape(num_rois, deltas.shape[1] // 4, 4)
        rows = torch.arange(num_rois, device=deltas.device)
        columns = self.labels if deltas.shape[1] > 1 else torch.zeros_like(self.labels)
        picked = deltas[rows, columns]
        return picked.new_zeros(num_rois, 2), torch.cat((picked, picked), dim=1)


class ClassifierRoIHeads(RoIHeads):
    """torchvision's `RoIHeads` with the loss and the scores of a `Classifier`.

    In training, `loss_classifier` is replaced by the classifier's own entries; all other losses and
    all draws of samples are torchvision's. At test, boxes are decoded, clipped, thresholded and
    suppressed per category as torchvision does, on the classifier's scores; `score_thresh`,
    `nms_thresh` and `detections_per_img` are read at each call.

    `convert_classifier` makes these; there is no need to build one.
    """

    @property
    def classifier(self) -> Classifier:
        """The classifier, which is `box_predictor.cls_score`."""
        return self.box_predictor.cls_score

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Run torchvision's forward pass; in training, swap the classification losses."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        self._check_labels(targets)
        # A shallow copy shares every parameter, buffer and submodule. Recording there rather than
        # here leaves nothing behind when a step fails, and lets threads train replicas.
        step = copy.copy(self)
        recorder = _Recorder(self.box_predictor)
        step._modules = {**self._modules, "box_predictor": recorder}
        detections, losses = super(ClassifierRoIHeads, step).forward(
            features, proposals, image_shapes, targets
        )
        del losses["loss_classifier"]
        # After torchvision's pass, so that its own random draws are those of the plain model.
        return detections, {**self.classifier.losses(recorder.logits, recorder.labels), **losses}

    def _check_labels(self, targets: list[dict[str, Tensor]] | None) -> None:
        num_categories = self.classifier.num_categories
        for index, target in enumerate(targets or []):
            labels = target.get("labels")
            # Looking at values on an accelerator would wait for it.
            if isinstance(labels, Tensor) and labels.device.type == "cpu" and labels.numel() > 0:
                for label in (int(labels.min()), int(labels.max())):
                    if not 1 <= label <= num_categories:
                        raise ValueError(
                            f"Expected `targets[{index}]['labels']` in [1, {num_categories}], "
                            f"got {label}"
                        )

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Sample RoIs as torchvision does; keep their labels, pass on foreground or not.

        Nothing after this reads more of a RoI's label than whether it is foreground: mask and
        keypoint losses take categories from the targets.
        """
        samples = super().select_training_samples(proposals, targets)
        recorder = self.box_predictor
        if not isinstance(recorder, _Recorder):
            return samples
        proposals, matched_idxs, labels, regression_targets = samples
        recorder.labels = torch.cat(labels)
        foreground = [(image_labels > 0).to(torch.int64) for image_labels in labels]
        return proposals, matched_idxs, foreground, regression_targets

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Turn logits and deltas into boxes, scores and labels, one tensor of each per image.

        torchvision has softmax written into this function, so it is written anew here. No gradient
        flows to the detections.
        """
        if box_regression.dtype in (torch.float16, torch.bfloat16):
            # Pixel coordinates do not fit in 8 or 11 bits: under autocast x = 801 would become 800
            # or 804.
            box_regression = box_regression.float()
        rois_per_image = [len(boxes) for boxes in proposals]
        scores_per_image = self.classifier.scores(class_logits)[:, 1:].split(rois_per_image)
        deltas_per_image = box_regression.split(rois_per_image)

        all_boxes, all_scores, all_labels = [], [], []
        for rois, deltas, scores, image_shape in zip(
            proposals, deltas_per_image, scores_per_image, image_shapes, strict=True
        ):
            boxes = self.box_coder.decode(deltas, [rois]).reshape(
                len(rois), deltas.shape[1] // 4, 4
            )
            boxes = clip_boxes_to_image(boxes, image_shape)
            detections = select_detections(
                boxes[:, 0] if boxes.shape[1] == 1 else boxes[:, 1:],
                scores,
                score_threshold=self.score_thresh,
                nms_threshold=self.nms_thresh,
                max_detections=self.detections_per_img,
                min_size=_MIN_SIZE,
            )
            all_boxes.append(detections.boxes)
            all_scores.append(detections.scores)
            all_labels.append(detections.categories + 1)
        return all_boxes, all_scores, all_labels


def convert_to_bags(
    model: _Model,
    layout: GroupLayout,
    others_ratio: float = 8.0,
    *,
    category_weights: Sequence[float] | np.ndarray | Tensor | None = None,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
    inplace: bool = True,
) -> _Model:
    """Turn a torchvision two-stage detector into a Balanced Group Softmax detector.

    The new head starts from the trained classifier (see `BAGSHead.from_linear`), so train the
    plain detector first or load its weights, convert, then `freeze` and train on.

    Args:
        model: A Faster, Mask or Keypoint R-CNN whose `cls_score` is an `nn.Linear` with a
            background and C category rows.
        layout: The groups, for C categories and with `background="first"`.
        others_ratio: How many "others" rows count per foreground row of a group.
        category_weights: Weights of foreground rows in their own group, [C].
        impl: Which implementation computes loss and scores.
        inplace: Change `model` itself; otherwise a deep copy is converted and `model` stays as it
            is.

    Returns:
        The converted model: `model` itself if `inplace`.

    Raises:
        TypeError: `model` or `layout` is of a type that cannot be served.
        ValueError: `layout` does not fit `model`, or `model` is converted already.

    Example:
        >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
        >>> from balanced_group_softmax import GroupLayout
        >>> model = fasterrcnn_mobilenet_v3_large_320_fpn(
        ...     weights=None, weights_backbone=None, num_classes=5
        ... )
        >>> layout = GroupLayout.from_counts([3, 50, 700, 9000])
        >>> model = convert_to_bags(model, layout)
        >>> sum(parameter.numel() for parameter in freeze(model, train="classifier"))
        10250
    """
    if not isinstance(layout, GroupLayout):
        raise TypeError(f"Expected `layout` to be a GroupLayout, got {type(layout).__name__}")
    predictor = _plain_roi_heads(model).box_predictor
    cls_score = predictor.cls_score
    if type(cls_score) is not nn.Linear:
        raise TypeError(
            f"Expected `model.{_CLASSIFIER}` to be an nn.Linear to start from, got "
            f"{type(cls_score).__name__}; make a BAGSHead yourself and call convert_classifier"
        )
    if layout.background != "first":
        raise ValueError(
            "Expected `layout` with background='first', since torchvision's label 0 is background, "
            f"got background={layout.background!r}"
        )
    _check_fit(predictor, layout.num_categories, cls_score.in_features)
    head = BAGSHead.from_linear(
        cls_score, layout, others_ratio=others_ratio, category_weights=category_weights, impl=impl
    )
    return convert_classifier(model, head, inplace=inplace)


def convert_classifier(model: _Model, classifier: Classifier, *, inplace: bool = True) -> _Model:
    """Replace the box classifier of a torchvision two-stage detector.

    `classifier` becomes `model.roi_heads.box_predictor.cls_score`, moved to the device and dtype
    of the layer that it replaces, and `model.roi_heads` becomes a `ClassifierRoIHeads` with
    everything that was set on it: thresholds, samplers, pools, mask and keypoint branches, hooks.
    Loading a state dict whose layout differs then fails before any weight of the detector is
    copied.

    Args:
        model: A Faster, Mask or Keypoint R-CNN (any module with torchvision's `RoIHeads` as
            `roi_heads`).
        classifier: An `nn.Module` that meets `Classifier`, with `background="first"`. It is not
            copied.
        inplace: Change `model` itself; otherwise a deep copy is converted and `model` stays as it
            is.

    Returns:
        The converted model: `model` itself if `inplace`.

    Raises:
        TypeError: `model` or `classifier` is of a type that cannot be served.
        ValueError: `classifier` does not fit `model`, or `model` is converted already.
    """
    roi_heads = _plain_roi_heads(model)
    check_classifier(classifier, background="first")
    _check_fit(roi_heads.box_predictor, classifier.num_categories, classifier.in_features)
    if not isinstance(classifier, nn.Module):
        raise TypeError(
            f"Expected `classifier` to be an nn.Module, got {type(classifier).__name__}"
        )
    if not inplace:
        model = copy.deepcopy(model)
        roi_heads = model.roi_heads
    replaced = roi_heads.box_predictor.cls_score
    like = next(replaced.parameters(), None)
    if like is not None:
        classifier.to(device=like.device, dtype=like.dtype)
    roi_heads.box_predictor.cls_score = classifier.train(replaced.training)
    # The new class adds methods and no state. Changing the class of the object keeps all that its
    # owner set on it, hooks included, which building a new one from a list of known attributes
    # would not.
    roi_heads.__class__ = ClassifierRoIHeads
    if hasattr(model, "register_load_state_dict_pre_hook"):
        model.register_load_state_dict_pre_hook(_check_state_dict)
    else:  # torch < 2.5
        model._register_load_state_dict_pre_hook(_check_state_dict, with_module=True)
    return model


def _check_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let the classifier look at a state dict before anything of the whole detector is copied."""
    check = getattr(module.get_submodule(_CLASSIFIER), "check_state_dict", None)
    if check is not None:
        check(state_dict, f"{prefix}{_CLASSIFIER}.")


def _plain_roi_heads(model: nn.Module) -> RoIHeads:
    """Return `model.roi_heads`, or say why this model cannot be converted."""
    roi_heads = _roi_heads(model)
    if isinstance(roi_heads, ClassifierRoIHeads):
        raise ValueError(
            "Expected `model` not to be converted yet, got one whose classifier is "
            f"{type(roi_heads.box_predictor.cls_score).__name__}; convert the plain model"
        )
    if type(roi_heads) is not RoIHeads:
        raise TypeError(
            "Expected `model.roi_heads` to be torchvision's RoIHeads, got its subclass "
            f"{type(roi_heads).__name__}, whose behaviour would be lost"
        )
    own = sorted(name for name in vars(roi_heads) if callable(getattr(RoIHeads, name, None)))
    if own:
        raise TypeError(
            "Expected `model.roi_heads` without methods of its own, got "
            f"{', '.join(own)} set on the object, which would hide the converted ones"
        )
    for name in ("cls_score", "bbox_pred"):
        if not isinstance(getattr(roi_heads.box_predictor, name, None), nn.Module):
            raise TypeError(
                "Expected `model.roi_heads.box_predictor` to have the layers cls_score and "
                "bbox_pred, as FastRCNNPredictor has, got "
                f"{type(roi_heads.box_predictor).__name__} without {name}"
            )
    return roi_heads


def _roi_heads(model: nn.Module) -> RoIHeads:
    """Return `model.roi_heads`, or say why this is no two-stage detector."""
    kind = type(model).__name__
    expected = (
        "Expected `model` to be a torchvision two-stage detector (Faster, Mask or Keypoint R-CNN)"
    )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{expected}, got a scripted one; convert the model that was scripted")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{expected}, got {kind}")
    for name in ("module", "_orig_mod"):
        if isinstance(getattr(getattr(model, name, None), "roi_heads", None), RoIHeads):
            raise TypeError(f"{expected}, got one wrapped in {kind}; pass its `{name}`")
    roi_heads = getattr(model, "roi_heads", None)
    if isinstance(roi_heads, torch.jit.ScriptModule):
        raise TypeError(f"{expected}, got one with scripted roi_heads; convert it before")
    if not isinstance(roi_heads, RoIHeads):
        why = ""
        if kind in ("RetinaNet", "FCOS", "SSD"):
            why = ", a one-stage detector: convolutions classify its anchors, there are no RoIs"
        raise TypeError(f"{expected}, got {kind}{why}")
    return roi_heads


def _check_fit(predictor: nn.Module, num_categories: int, in_features: int) -> None:
    """Check that a classifier of these sizes can take the place of the predictor's own."""
    # Layers other than nn.Linear may not say their sizes; then the first forward pass tells.
    num_labels = getattr(predictor.cls_score, "out_features", num_categories + 1)
    if num_categories + 1 != num_labels:
        raise ValueError(
            f"Expected a classifier or layout of {num_labels - 1} categories, since "
            f"`model.{_CLASSIFIER}` has {num_labels} outputs, background included; got "
            f"{num_categories} categories"
        )
    expected_features = getattr(predictor.cls_score, "in_features", in_features)
    if in_features != expected_features:
        raise ValueError(
            f"Expected `classifier` with in_features={expected_features}, as "
            f"`model.{_CLASSIFIER}` has, got {in_features}"
        )
    deltas = getattr(predictor.bbox_pred, "out_features", 4)
    if deltas not in (4, 4 * num_labels):
        raise ValueError(
            "Expected `model.roi_heads.box_predictor.bbox_pred` with 4 outputs (class-agnostic) or "
            f"{4 * num_labels} (4 for each of {num_labels} labels), got {deltas}"
        )


def freeze(model: nn.Module, train: Train = "classifier") -> list[nn.Parameter]:
    """Choose what of a torchvision two-stage detector trains; the rest is frozen.

    | `train` | trains |
    |---|---|
    | "classifier" | the classification layer `cls_score` only, as in the original's second stage |
    | "box_head" | box head and box predictor, `bbox_pred` included |
    | "box_and_mask_heads" | these and the mask and keypoint heads and predictors |
    | "all" | everything that trained before the first call |

    Frozen parameters get `requires_grad=False`. Frozen modules go to eval mode and return to it
    whenever `model.train()` is called (dropout is off, running statistics stay as they are). The
    detector, its transform, its RPN and its RoI heads follow `train()` themselves, for there the
    mode chooses the procedure (training proposals, losses), not how a layer computes; losses of
    frozen parts are still reported and carry no gradient. Parameters that were frozen before the
    first call stay frozen.

    The memory of what is frozen is a child module `frozen` without parameters: the state dict has
    no new key, and copies, pickles, `torch.compile` and DDP need nothing special. Freeze before
    wrapping in DDP, and call `train()` on the model or its wrapper rather than on single children.

    Args:
        model: A Faster, Mask or Keypoint R-CNN, converted or not.
        train: What trains. Another call with another value takes the place of the first.

    Returns:
        The parameters that train, for an optimiser.

    Raises:
        TypeError: `model` is no torchvision two-stage detector.
        ValueError: `train` is unknown, or nothing would train.
    """
    roi_heads = _roi_heads(model)
    if train not in get_args(Train):
        raise ValueError(f"Expected `train` to be one of {get_args(Train)}, got {train!r}")
    return freeze_all_but(
        model,
        _trainable_modules(model, roi_heads, train),
        follow_train=(GeneralizedRCNN, GeneralizedRCNNTransform, RegionProposalNetwork, RoIHeads),
    )


def _trainable_modules(model: nn.Module, roi_heads: RoIHeads, train: Train) -> list[nn.Module]:
    if train == "all":
        return [model]
    if train == "classifier":
        return [roi_heads.box_predictor.cls_score]
    names = ["box_head", "box_predictor"]
    if train == "box_and_mask_heads":
        names += ["mask_head", "mask_predictor", "keypoint_head", "keypoint_predictor"]
    return [module for name in names if (module := getattr(roi_heads, name)) is not None]
