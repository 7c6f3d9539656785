"""Every config of examples/detectron2: builds, takes a step in detectron2's trainer, predicts."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip(
    "detectron2.modeling", reason="detectron2 is not installed: docs/detectron2.md says how"
)

from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "detectron2"
sys.path.append(str(EXAMPLES))
sys.path.insert(0, str(FOLDER))

import detectron2_setup  # noqa: E402
import lazyconfig_train_net  # noqa: E402
import train_net  # noqa: E402

from balanced_group_softmax import GroupLayout  # noqa: E402
from balanced_group_softmax.adapters.detectron2 import freeze  # noqa: E402

YAML = sorted(path.name for path in (FOLDER / "configs").glob("*.yaml"))
LAZY = sorted(path.name for path in (FOLDER / "configs/lazy").glob("*_v*.py"))
DETECTORS = ("faster_rcnn_r50", "faster_rcnn_x101", "mask_rcnn_r50", "cascade_mask_rcnn_r50")
NUM_CATEGORIES = {"v0.5": 1230, "v1": 1203}
SIDE = 64


def counts(version: str) -> list[int]:
    """Some of every group, and zeros."""
    return [(7 * i) % 1500 for i in range(NUM_CATEGORIES[version])]


def write_lvis(root: Path, version: str) -> None:
    """Files as detectron2 expects those of LVIS, with three images in each split."""
    categories = [
        {"id": i + 1, "name": f"c{i}", "frequency": "rcf"[i % 3], "instance_count": count}
        for i, count in enumerate(counts(version))
    ]
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images, annotations = [], []
        for i in range(1, 4):
            folder = root / "coco" / f"{split}2017"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:012d}.jpg")
            url = f"http://images.example.org/{split}2017/{i:012d}.jpg"
            images.append({"id": i, "coco_url": url, "height": SIDE, "width": SIDE})
            images[-1] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
            for k in range(2):
                x, y, w, h = 4.0 + 6 * k, 8.0, 40.0, 36.0
                outline = [x, y, x + w, y, x + w, y + h, x, y + h]
                row = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + 300 * k + i}
                row |= {"bbox": [x, y, w, h], "area": w * h, "segmentation": [outline]}
                annotations.append(row)
        data = {"images": images, "annotations": annotations, "categories": categories}
        path = root / "lvis" / f"lvis_{version}_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lvis")
    for version in NUM_CATEGORIES:
        write_lvis(root / "datasets", version)
    return root


@pytest.fixture(autouse=True)
def _there(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.path.isabs(MetadataCatalog.get("lvis_v1_train").json_file):
        pytest.skip("DETECTRON2_DATASETS is set: the tests draw a data set of their own")
    monkeypatch.chdir(datasets)


def version_of(name: str) -> str:
    return "v1" if "_v1" in name else "v0.5"


def test_there_is_a_config_of_each_kind() -> None:
    for detector in DETECTORS:
        for stage in ("", "_bags"):
            assert {f"{detector}_lvis_{v}{stage}.yaml" for v in ("v0.5", "v1")} <= set(YAML)
            assert {f"{detector}_{v}{stage}.py" for v in ("v05", "v1")} <= set(LAZY)


SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", f"({SIDE},)", "INPUT.MIN_SIZE_TEST", str(SIDE)),
    *("SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", "2"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
]


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, tmp_path: Path) -> None:
    options = [*SMALL, "OUTPUT_DIR", str(tmp_path)]
    cfg = train_net.make_config(str(FOLDER / "configs" / name), options)
    trainer = train_net.Trainer(cfg)
    check(trainer._trainer, name, mask=cfg.MODEL.MASK_ON)
    sampler = trainer.data_loader.dataset.dataset.sampler
    assert isinstance(sampler, RepeatFactorTrainingSampler) == ("_rfs" in name)
    assert cfg.SOLVER.BASE_LR == (0.01 if "bags" in name else 0.02)
    evaluator = trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    assert ("segm" in evaluator.kinds) == ("mask" in name)


@pytest.mark.parametrize("name", LAZY)
def test_lazy(name: str) -> None:
    cfg = LazyConfig.load(str(FOLDER / "configs/lazy" / name))
    cfg.dataloader.train.mapper.augmentations[0].short_edge_length = (SIDE,)
    cfg.dataloader.train.update(total_batch_size=2, num_workers=0)
    cfg.model.proposal_generator.post_nms_topk = (20, 20)
    assert cfg.optimizer.lr == (0.01 if "bags" in name else 0.02)
    cfg.optimizer.lr *= cfg.lr_multiplier.warmup_factor / 100
    model = instantiate(cfg.model)
    freeze(model, cfg.train.trainable)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer))
    check(trainer, name, mask="mask" in name)
    assert ("sampler" in cfg.dataloader.train) == ("_rfs" in name)
    assert ("segm" in instantiate(cfg.dataloader.evaluator).kinds) == ("mask" in name)


@pytest.mark.parametrize("detector", DETECTORS)
def test_yaml_and_lazy_are_the_same_detector(detector: str) -> None:
    path = FOLDER / "configs" / f"{detector}_lvis_v1_bags.yaml"
    from_yaml = build_model(train_net.make_config(str(path), SMALL))
    path = FOLDER / "configs/lazy" / f"{detector}_v1_bags.py"
    from_lazy = instantiate(LazyConfig.load(str(path)).model)

    def facts(model: nn.Module) -> dict[str, Any]:
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        return shapes | {f"{k} trains": p.requires_grad for k, p in model.named_parameters()}

    assert facts(from_yaml) == facts(from_lazy)


def check(trainer: SimpleTrainer, name: str, *, mask: bool) -> None:
    """A step of training, and a prediction."""
    model: Any = trainer.model.train()
    with torch.no_grad():  # untrained and with frozen normalisation, pixels would saturate it
        model.backbone.bottom_up.stem.conv1.weight.mul_(1e-3)
    trainer.iter = 0
    with EventStorage() as storage:
        trainer.run_step()
    logged = set(storage.latest())
    is_bags, cascade = "_bags" in name, "cascade" in name
    suffixes = [f"_stage{stage}" for stage in range(3)] if cascade else [""]
    expected = {"loss_cls_bg_fg", "loss_cls_0_10"} if is_bags else {"loss_cls"}
    assert {loss + suffix for loss in expected for suffix in suffixes} <= logged
    assert ("loss_mask" in logged) == mask
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    assert trained
    if is_bags:
        assert all(".cls_score.fc." in key for key in trained)
        assert len(trained) == 2 * len(suffixes)
        found = model.roi_heads.box_predictor
        head = (found[0] if isinstance(found, nn.ModuleList) else found).cls_score
        version = version_of(name)
        ids = range(1, NUM_CATEGORIES[version] + 1)
        assert head.layout == GroupLayout.from_counts(
            counts(version), background="last", category_ids=ids
        )
    else:
        assert any(key.startswith("backbone") for key in trained)
    found = model.roi_heads.box_predictor
    for predictor in found if isinstance(found, nn.ModuleList) else [found]:
        predictor.test_score_thresh = 0.0  # untrained, all scores are about 1 / C
        predictor.test_topk_per_image = 5  # masks of 1203 categories are large
    model.eval()
    image = {"image": torch.rand(3, SIDE, SIDE) * 255, "height": SIDE, "width": SIDE}
    with torch.no_grad():
        detections = model([image])[0]["instances"]
    assert 0 < len(detections) <= 5
    assert detections.has("pred_masks") == mask


def test_a_lazy_config_of_fewer_images_a_step(tmp_path: Path) -> None:
    whole = LazyConfig.load(str(FOLDER / "configs/lazy/mask_rcnn_r50_v1_bags.py"))
    path = tmp_path / "mine.py"
    text = "from .lvis import bags\n"
    text += (
        'model, dataloader, optimizer, lr_multiplier, train = bags("mask_rcnn_r50", "v1", batch=4)'
    )
    path.write_text(text)
    shutil.copy(FOLDER / "configs/lazy/lvis.py", tmp_path)
    part = LazyConfig.load(str(path))
    assert (
        part.dataloader.train.total_batch_size == whole.dataloader.train.total_batch_size / 4 == 4
    )
    assert part.optimizer.lr == whole.optimizer.lr / 4 == 0.01 / 4
    assert part.train.max_iter == pytest.approx(4 * whole.train.max_iter, abs=4)
    steps = [one.lr_multiplier.warmup_length * one.train.max_iter for one in (whole, part)]
    assert steps == pytest.approx([500, 2000], rel=1e-4)


def test_the_model_zoo_has_what_the_documentation_starts_from() -> None:
    text = (EXAMPLES.parent / "docs/detectron2.md").read_text()
    (config,) = re.findall(r"configs/(\S+)_bags\.yaml MODEL.WEIGHTS", text)
    (name,) = re.findall(r'url\("(\S+)"\)', text)
    assert model_zoo.get_checkpoint_url(name).endswith(".pkl")
    theirs = model_zoo.get_config(name)
    theirs.MODEL.DEVICE = "cpu"
    ours = train_net.make_config(str(FOLDER / "configs" / f"{config}.yaml"), SMALL)
    shapes = [
        {key: value.shape for key, value in build_model(cfg).state_dict().items()}
        for cfg in (theirs, ours)
    ]
    assert shapes[0] == shapes[1]


def test_resnext_of_the_paper_by_config() -> None:
    """As docs/detectron2.md says it: 64x4d, with weights that need other pixels."""
    options = [
        *SMALL,
        *("MODEL.RESNETS.NUM_GROUPS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
        *("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "(123.675,116.28,103.53)"),
        *("MODEL.PIXEL_STD", "(58.395,57.12,57.375)"),
    ]
    path = FOLDER / "configs" / "faster_rcnn_x101_lvis_v1_bags.yaml"
    model: Any = build_model(train_net.make_config(str(path), options))
    convolution = model.backbone.bottom_up.res2[0].conv2
    assert (convolution.groups, convolution.out_channels) == (64, 256)
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_gradients_are_clipped_by_their_common_norm() -> None:
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    hook = lazyconfig_train_net.ClipGradients(1.0)
    hook.trainer = SimpleNamespace(optimizer=optimizer)
    weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    hook.after_backward()
    torch.testing.assert_close(torch.cat([one.grad for one in weights]), torch.tensor([0.6, 0.8]))


def test_gradients_that_a_scaler_enlarged_are_clipped_as_they_are() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    hook = lazyconfig_train_net.ClipGradients(2.0)
    trainer = AMPTrainer.__new__(AMPTrainer)
    trainer.optimizer, trainer.grad_scaler = optimizer, torch.amp.GradScaler("cpu", 1024.0)
    hook.trainer = trainer
    trainer.grad_scaler.scale(weight.sum()).backward()
    hook.after_backward()
    trainer.grad_scaler.step(optimizer)
    assert weight.item() == -1.0  # neither 1024 nor 2, to which 1024 would have been clipped


def detector_of(num_classes: int, layout: GroupLayout | None = None) -> nn.Module:
    """As much of a detector as is asked for its categories."""
    model, heads = nn.Module(), nn.Module()
    heads.num_classes, heads.box_predictor = num_classes, nn.Module()
    heads.box_predictor.layout = layout
    model.roi_heads = heads
    return model


@pytest.fixture
def gaps() -> Iterator[str]:
    """A data set with the categories 3, 17, 90 and 91."""
    labels = {3: 0, 17: 1, 90: 2, 91: 3}
    metadata = MetadataCatalog.get("with_gaps")
    metadata.set(thing_classes=[*"abcd"], thing_dataset_id_to_contiguous_id=labels)
    yield "with_gaps"
    MetadataCatalog.remove("with_gaps")


@pytest.mark.parametrize("given", [3, 5])
def test_another_number_of_categories_than_the_data_has(gaps: str, given: int) -> None:
    with pytest.raises(ValueError, match=rf"NUM_CLASSES.* 4, as many.*'with_gaps'.*got {given}"):
        detectron2_setup.check_categories(detector_of(given), gaps)
    detectron2_setup.check_categories(detector_of(4), [gaps])


def test_groups_of_other_data(gaps: str) -> None:
    def layout(ids: list[int] | None) -> GroupLayout:
        return GroupLayout.from_counts([1, 2, 30, 4], category_ids=ids)

    for ids in ([3, 17, 90, 91], None):
        detectron2_setup.check_categories(detector_of(4, layout(ids)), gaps)
    with pytest.raises(ValueError, match=r"label 1 is category 17, got.*category 18"):
        detectron2_setup.check_categories(detector_of(4, layout([3, 18, 90, 91])), gaps)


def test_of_several_training_sets_none_is_counted_in_for_evaluation() -> None:
    name = "lvis_v1_train"
    assert train_net.one_with_annotations((name,)) == name
    assert train_net.one_with_annotations((name, "lvis_v1_val")) is None
    assert train_net.one_with_annotations(("lvis_v1_test_dev",)) is None  # no such file here


def test_annotations_of_a_list_of_data_sets() -> None:
    path = detectron2_setup.annotations_of(["lvis_v1_train"])
    assert path == detectron2_setup.annotations_of("lvis_v1_train")
    with pytest.raises(ValueError, match=r"one data set.*got \['a', 'b'\]"):
        detectron2_setup.annotations_of(["a", "b"])


def test_own_data_must_have_a_new_name(tmp_path: Path) -> None:
    train_net.register_datasets([("mine", "a.json", "images")])
    train_net.register_datasets([("mine", "a.json", "images")])
    with pytest.raises(ValueError, match=r"'mine' of a\.json"):
        train_net.register_datasets([("mine", "b.json", "images")])
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")
