"""Every config builds, takes a training step in which the right part learns, and predicts."""

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

import torch
from mmdet_cases import EXAMPLES, NAMES, batch, build, losses_of, read_config
from torch import nn

from balanced_group_softmax.adapters.mmdet import check_detector, freeze

TRAINS = {
    "classifier": ("fc_cls",),
    "box_head": ("bbox_head",),
    "all": ("",),
}


def test_there_are_configs_of_every_kind() -> None:
    assert {name.partition("/")[0] for name in NAMES} == {
        "ablations", "bags", "baselines", "demo", "transferred"
    }  # fmt: skip
    assert len(NAMES) == 53


def test_the_readme_names_every_config() -> None:
    readme = (EXAMPLES / "mmdet" / "README.md").read_text()
    for name in NAMES:
        folder, _, file = name.partition("/")
        network, _, data = file.rpartition("_lvis-")
        if data == "v1":  # beside that of v0.5, as the README says
            assert f"{folder}/{network}_lvis-v0.5" in NAMES
        elif folder == "ablations":
            assert f"`{file.removeprefix('bags_faster-rcnn_r50_fpn_')}`" in readme, name
        else:
            assert file in readme, name


@pytest.mark.parametrize("name", NAMES)
def test_a_step_and_a_prediction(name: str) -> None:
    config = read_config(name)
    model = build(config)
    hooks = [hook for hook in config.get("custom_hooks", []) if hook.type == "BAGSFreezeHook"]
    train = hooks[0].train if hooks else "all"
    assert bool(hooks) or config.model.roi_head.get("bbox_head") is not None
    could_train = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    freeze(model, train)
    check_detector(model)
    model.train()

    data = model.data_preprocessor(batch(config.num_classes), True)
    losses = model(**data, mode="loss")
    total, log = model.parse_losses(losses)
    total.backward()
    assert all(bool(value.isfinite().all()) for value in log.values()), log
    if losses_of(config)[0].type == "BAGSLoss":
        groups = [key for key in log if "loss_cls_" in key and "rpn" not in key]
        stages = len(losses_of(config))
        thresholds = losses_of(config)[0].get("thresholds", (10, 100, 1000))
        assert len(groups) == stages * (len(thresholds) + 2)
        assert sum("acc_" in key for key in log) == len(groups)

    expected = {
        n for n in could_train if any(f".{part}." in f".{n}" or not part for part in TRAINS[train])
    }
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == expected
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient <= trained
    for stage in _stages(model):  # a group without a foreground row leaves its columns at zero
        assert stage.fc_cls.weight.grad.abs().sum() > 0
    if train != "all":
        assert not model.backbone.training

    model.eval()
    with torch.no_grad():
        found = model.test_step(batch(config.num_classes))
    for sample in found:
        instances = sample.pred_instances
        assert len(instances) <= 10
        assert bool(instances.scores.isfinite().all())
        assert ((instances.labels >= 0) & (instances.labels < config.num_classes)).all()
        assert ("masks" in instances) == model.roi_head.with_mask
    assert sum(len(sample.pred_instances) for sample in found) > 0


def _stages(model: nn.Module) -> list[nn.Module]:
    heads = model.roi_head.bbox_head
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]
