"""What is there before a documented block runs, and what has to hold after it.

A setting prepares the working directory, yields the names that Python blocks start with, and
checks what the blocks have left.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from document_blocks import ROOT, Block, link_repository, run_chain
from torch import nn

from balanced_group_softmax import BAGSHead, GroupLayout
from balanced_group_softmax.legacy.files import write_original_files

sys.path.insert(0, str(ROOT / "examples"))

Names = dict[str, Any]
Setting = Callable[[Path], contextlib.AbstractContextManager[Names]]

TRAIN = "examples/torchvision_lvis_train.py"
DETECTRON2_CONFIG = ROOT / "examples/detectron2/configs/lazy/faster_rcnn_r50_v1.py"
MMDET_CONFIG = ROOT / "examples/mmdet/configs/baselines/faster-rcnn_r50_fpn_1x_lvis-v1.py"
COUNTS = [3, 2500, 40, 7, 600]
SETTINGS: dict[str | None, Setting] = {}


def setting(name: str | None) -> Callable[[Callable[[Path], Iterator[Names]]], Setting]:
    """Register what prepares a folder under the name that marks give."""

    def register(prepare: Callable[[Path], Iterator[Names]]) -> Setting:
        SETTINGS[name] = contextlib.contextmanager(prepare)
        return SETTINGS[name]

    return register


def run_in_its_setting(chain: list[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a chain of blocks in an empty folder that its setting prepares."""
    monkeypatch.chdir(folder)
    link_repository(folder)
    with SETTINGS[chain[0].text](folder) as names:
        run_chain(chain, folder, names)


# --- nothing but the library ---------------------------------------------------------------------


@setting(None)
def nothing(folder: Path) -> Iterator[Names]:
    yield {}


@setting("the first example")
def first_example(folder: Path) -> Iterator[Names]:
    names: Names = {}
    yield names
    assert names["scores"].shape == (8, 6)
    names["loss"].backward()
    assert names["head"].fc.weight.grad.abs().sum() > 0


@setting("classification")
def classification(folder: Path) -> Iterator[Names]:
    names: Names = {}
    yield names
    assert names["head"].layout.background is None


@setting("counts of LVIS")
def counts_of_lvis(folder: Path) -> Iterator[Names]:
    rows = [{"id": index, "instance_count": count} for index, count in enumerate(COUNTS)]
    (folder / "lvis_v1_train_categories.json").write_text(json.dumps(rows), encoding="utf-8")
    yield {}


# --- in a program --------------------------------------------------------------------------------


def write_annotations(path: Path, counts: Sequence[int] = COUNTS) -> None:
    """Categories with their instance counts, as LVIS states them."""
    rows = [{"id": index, "instance_count": count} for index, count in enumerate(counts)]
    path.write_text(json.dumps({"categories": rows}), encoding="utf-8")


def softmax_detector() -> nn.Module:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    num_labels = 1 + len(COUNTS)
    return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_labels)


def layout_of_counts() -> GroupLayout:
    return GroupLayout.from_counts(COUNTS, category_ids=range(len(COUNTS)))


@setting("a trained detector")
def trained_detector(folder: Path) -> Iterator[Names]:
    """`annotations.json`, `softmax.pth`, and a `model` with its `counts`."""
    write_annotations(folder / "annotations.json")
    model = softmax_detector()
    torch.save(model.state_dict(), folder / "softmax.pth")
    linear = model.roi_heads.box_predictor.cls_score
    counts = torch.tensor(COUNTS)
    names = {"model": model, "counts": counts, "linear": linear, "layout": layout_of_counts()}
    yield names
    if "parameters" in names:
        trains = sum(parameter.numel() for parameter in names["parameters"])
        assert trains == sum(p.numel() for p in names["model"].parameters() if p.requires_grad)
        assert trains in {1025 * num_logits for num_logits in (6, 11)}  # softmax, BAGS
    assert names["layout"] == layout_of_counts()


@setting("bags.pth")
def bags_checkpoint(folder: Path) -> Iterator[Names]:
    from balanced_group_softmax.adapters.torchvision import convert_to_bags

    bags = convert_to_bags(softmax_detector(), layout_of_counts())
    torch.save(bags.state_dict(), folder / "bags.pth")
    names: Names = {}
    yield names
    assert names["layout"] == layout_of_counts()
    loaded = names["model"].state_dict()
    assert torch.equal(
        loaded["roi_heads.box_predictor.cls_score.fc.weight"],
        bags.roi_heads.box_predictor.cls_score.fc.weight,
    )


@setting("checkpoints of both stages")
def checkpoints_of_both_stages(folder: Path) -> Iterator[Names]:
    """`softmax.pth` and `bags.pth`, a detector and what stage two makes of it."""
    from balanced_group_softmax.adapters.torchvision import convert_to_bags

    model = softmax_detector()
    torch.save(model.state_dict(), folder / "softmax.pth")
    torch.save(convert_to_bags(model, layout_of_counts()).state_dict(), folder / "bags.pth")
    names: Names = {}
    yield names
    assert names["changed"] == [
        f"roi_heads.box_predictor.cls_score.fc.{k}" for k in ("weight", "bias")
    ]


# --- training and evaluation ---------------------------------------------------------------------


@setting("the drawn data")
def drawn_data(folder: Path) -> Iterator[Names]:
    """Nothing: programs that draw data where they are given none have small data drawn."""
    yield {}
    tables = [path.read_text(encoding="utf-8") for path in (folder / "runs").rglob("table.md")]
    assert tables
    assert all("AP" in table for table in tables)


@setting("own data")
def own_data(folder: Path) -> Iterator[Names]:
    """Annotations and images of one's own: `train.json`, `train/`, `val.json`, `val/`."""
    stand_ins.draw(folder / "drawn")
    for part in ("train.json", "train", "val.json", "val"):
        (folder / "drawn" / part).rename(folder / part)
    yield {}


@setting("own data and a softmax detector")
def own_data_and_detector(folder: Path) -> Iterator[Names]:
    """`train.json` and `val.json` with `images/` for both, and `runs/softmax/softmax.pt`."""
    with own_data(folder):
        in_one_folder(folder)
        data = ["--annotations", "train.json", "--images", "images"]
        data += ["--val-annotations", "val.json", "--val-images", "images"]
        stand_ins.main("python", [TRAIN, *data, "--stage", "softmax", "--output", "runs/softmax"])
        yield {}


def in_one_folder(folder: Path) -> None:
    """Move the images of both splits into `images/`."""
    (folder / "images").mkdir()
    for split in ("train", "val"):
        content = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
        for image in content["images"]:
            name = image["file_name"]
            image["file_name"] = f"{split}-{name}"
            (folder / split / name).rename(folder / "images" / image["file_name"])
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


@setting("checkpoints")
def checkpoints(folder: Path) -> Iterator[Names]:
    """`softmax.pt` and `bags.pt` of the training example."""
    stand_ins.main("python", [TRAIN, "--stage", "softmax", "--output", "runs/softmax"])
    (folder / "runs/softmax/softmax.pt").rename(folder / "softmax.pt")
    start = [TRAIN, "--stage", "bags", "--checkpoint", "softmax.pt"]
    stand_ins.main("python", [*start, "--output", "runs/bags"])
    (folder / "runs/bags/bags.pt").rename(folder / "bags.pt")
    yield {}
    assert (folder / "norms.png").stat().st_size > 10_000


@setting("LVIS")
def lvis_files(folder: Path) -> Iterator[Names]:
    """Annotations under the names of LVIS, images in `coco/train2017` and `coco/val2017`."""
    stand_ins.draw(folder / "drawn")
    for split in ("train", "val"):
        (folder / "drawn" / split).rename(make(folder / "coco") / f"{split}2017")
        content = json.loads((folder / "drawn" / f"{split}.json").read_text(encoding="utf-8"))
        for image in content["images"]:
            name = image.pop("file_name")
            image["coco_url"] = f"http://images.cocodataset.org/{split}2017/{name}"
        for version in ("v0.5", "v1"):
            (folder / f"lvis_{version}_{split}.json").write_text(json.dumps(content))
    yield {}


def make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@setting("LVIS in folders")
def lvis_in_folders(folder: Path) -> Iterator[Names]:
    """The same with the annotations in `lvis/`."""
    with lvis_files(folder):
        for path in sorted(folder.glob("lvis_*.json")):
            path.rename(make(folder / "lvis") / path.name)
        yield {}
        for version in ("v0.5", "v1"):
            links = folder / "data" / f"lvis_{version}"
            if links.exists():
                assert (links / "annotations" / f"lvis_{version}_train.json").is_file()
                assert any((links / "train2017").iterdir())
                assert any((links / "val2017").iterdir())
        smoke = folder / "smoke"
        if smoke.exists():
            trained = {path.parent.name for path in smoke.glob("runs/r50/*/table.md")}
            assert trained == {"softmax", "bags", "continued"}
            assert (smoke / "results.json").is_file()


@setting("a softmax detector")
def softmax_checkpoint(folder: Path) -> Iterator[Names]:
    """`runs/softmax/softmax.pt`, trained on the data that programs draw."""
    stand_ins.main("python", [TRAIN, "--stage", "softmax", "--output", "runs/softmax"])
    yield {}


@setting("LVIS and trained detectors")
def trained_on_lvis(folder: Path) -> Iterator[Names]:
    """`runs/softmax/softmax.pt` and `runs/bags/bags.pt`, small Mask R-CNNs, with `LVIS`."""
    with lvis_files(folder):
        data = ["--annotations", "lvis_v1_train.json", "--images", "coco"]
        data += ["--val-annotations", "lvis_v1_val.json", "--val-images", "coco"]
        start = [TRAIN, *data, "--detector", "mask_rcnn"]
        stand_ins.main("python", [*start, "--stage", "softmax", "--output", "runs/softmax"])
        start += ["--checkpoint", "runs/softmax/softmax.pt"]
        stand_ins.main("python", [*start, "--stage", "bags", "--output", "runs/bags"])
        yield {}


@setting("figures by hand")
def figures_by_hand(folder: Path) -> Iterator[Names]:
    """Nothing; AP, AP fixed and pooled AP are those of the comments."""
    names: Names = {}
    yield names
    assert names["first"] == [100, 100, 83.5]
    assert names["second"] == names["raised"] == [100, 100, 100]
    assert names["crowded"] == [50, 100, 50.8]
    assert names["beside"] == [70, 70, 70.3]


@setting("outputs of a detector")
def outputs_of_a_detector(folder: Path) -> Iterator[Names]:
    """`outputs`: the id of each image of `val.json` and what torchvision would return for it.

    It finds every box. The same is in two shards in `folder`, of `n` ranks.
    """
    from detection_results import from_torchvision
    from results_files import ShardWriter

    with own_data(folder):
        content = json.loads((folder / "val.json").read_text(encoding="utf-8"))
        names: Names = {
            "image_ids": [image["id"] for image in content["images"]],
            "category_ids": sorted(row["id"] for row in content["categories"]),
            "folder": make(folder / "shards"),
            "n": 2,
        }
        rows: dict[int, list[Names]] = {image_id: [] for image_id in names["image_ids"]}
        for row in content["annotations"]:
            rows[row["image_id"]].append(row)
        names["outputs"] = [(i, perfect(rows[i], names["category_ids"])) for i in rows]
        for rank in range(2):
            with ShardWriter(names["folder"], rank, 2) as writer:
                for image_id, output in names["outputs"][rank::2]:
                    writer.append(from_torchvision(image_id, output, names["category_ids"]))
        yield names
        assert names["metrics"]["bbox"]["AP"] == pytest.approx(100)
        written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        assert len(written) == len(content["annotations"])


def perfect(rows: list[Names], category_ids: list[int]) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = torch.zeros(len(rows), 1, 128, 128)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[0, y1:y2, x1:x2] = 1
    labels = [category_ids.index(row["category_id"]) + 1 for row in rows]
    scores = torch.ones(len(rows))
    return {"boxes": boxes, "labels": torch.tensor(labels), "scores": scores, "masks": masks}


# --- files of the original -----------------------------------------------------------------------


@setting("files of the original")
def files_of_the_original(folder: Path) -> Iterator[Names]:
    """`data/lvis`, annotations under the name of LVIS v0.5, and a checkpoint of its classifier."""
    with lvis_files(folder):
        annotations = folder / "lvis_v0.5_train.json"
        content = json.loads(annotations.read_text(encoding="utf-8"))
        layout = write_original_files(content, folder / "data" / "lvis")
        head = {
            "bbox_head.fc_cls.weight": torch.randn(layout.num_logits, 8),
            "bbox_head.fc_cls.bias": torch.randn(layout.num_logits),
        }
        saved = {"meta": {}, "state_dict": head}
        torch.save(saved, folder / "gs_faster_rcnn_r50_fpn_1x_lvis_with0_bg8.pth")
        yield {}
        if (folder / "layout.json").exists():
            assert GroupLayout.load(folder / "layout.json").groups == layout.groups
        if (folder / "bags.pth").exists():
            state = torch.load(folder / "bags.pth", weights_only=True)["state_dict"]
            assert GroupLayout.from_state_dict(state).groups == layout.groups


# --- other frameworks ----------------------------------------------------------------------------


@setting("LVIS v1 for mmdet")
def mmdet_configuration(folder: Path) -> Iterator[Names]:
    """The training annotations where mmdet expects them, with 1203 categories."""
    place = folder / "data" / "lvis_v1" / "annotations"
    place.mkdir(parents=True)
    write_annotations(place / "lvis_v1_train.json", [1 + 3 * index for index in range(1203)])
    names: Names = {}
    yield names

    from mmengine.config import Config

    config = Config.fromfile(MMDET_CONFIG)
    loss = names["model"]["roi_head"]["bbox_head"]["loss_cls"]
    config.merge_from_dict({name: names[name] for name in ("model", "custom_hooks")})
    head = config.model.roi_head.bbox_head
    assert head.loss_cls == {key: value for key, value in loss.items() if key != "_delete_"}
    built = build_mmdet(config, names["custom_imports"]["imports"])
    assert built.fc_cls.out_features == built.loss_cls.layout.num_logits == 1203 + 6


def build_mmdet(config: Any, imports: list[str]) -> Any:
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings(imports)
    init_default_scope("mmdet")
    head = config.model.roi_head.bbox_head
    return MODELS.build(head)


@setting("own data of 350 categories")
def many_categories(folder: Path) -> Iterator[Names]:
    """`train.json` and `val.json` with 350 categories, and `images/` for both."""
    with own_data(folder):
        in_one_folder(folder)
        for split in ("train", "val"):
            content = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
            known = len(content["categories"])
            content["categories"] += [
                {**content["categories"][0], "id": 1000 + i, "name": f"category {i}"}
                for i in range(350 - known)
            ]
            (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
        yield {}
        state = torch.load(folder / "runs/bags/model_final.pth", weights_only=True)["model"]
        assert GroupLayout.from_state_dict(state).num_categories == 350


@setting("a YAML config of detectron2")
def detectron2_yaml(folder: Path) -> Iterator[Names]:
    write_annotations(folder / "train.json")
    levels = ["p2", "p3", "p4", "p5"]
    stages = ["res2", "res3", "res4", "res5"]
    model = {
        **{"META_ARCHITECTURE": "GeneralizedRCNN", "DEVICE": "cpu", "WEIGHTS": ""},
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {"OUT_FEATURES": stages},
        "FPN": {"IN_FEATURES": stages},
        "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
        "RPN": {"IN_FEATURES": [*levels, "p6"]},
        "ROI_HEADS": {"IN_FEATURES": levels, "NUM_CLASSES": len(COUNTS)},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
        "BAGS": {"ANNOTATIONS": "train.json"},
    }
    (folder / "yours.yaml").write_text(json.dumps({"MODEL": model}), encoding="utf-8")
    names: Names = {}
    yield names
    trains = sum(p.numel() for p in names["model"].parameters() if p.requires_grad)
    assert trains == 1025 * 11


@setting("a LazyConfig of detectron2")
def detectron2_lazy(folder: Path) -> Iterator[Names]:
    from detectron2.config import LazyConfig, instantiate

    sys.path.insert(0, str(ROOT / "examples" / "detectron2"))  # which configs import from
    write_annotations(folder / "lvis_v1_train.json")
    model = LazyConfig.load(str(DETECTRON2_CONFIG)).model
    model.roi_heads.num_classes = len(COUNTS)
    yield {"model": model}
    predictor = instantiate(model.roi_heads.box_predictor)
    assert predictor.cls_score.layout.num_categories == len(COUNTS)


@setting("a checkpoint of detectron2")
def detectron2_checkpoint(folder: Path) -> Iterator[Names]:
    head = BAGSHead(8, GroupLayout.from_counts(COUNTS, background="last"))
    state = {f"roi_heads.box_predictor.cls_score.{k}": v for k, v in head.state_dict().items()}
    torch.save({"model": state}, folder / "model_final.pth")
    names: Names = {}
    yield names
    assert names["layout"] == head.layout
