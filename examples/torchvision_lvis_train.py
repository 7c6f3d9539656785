"""Balanced Group Softmax in a torchvision detector: train, compare, draw.

    python examples/torchvision_lvis_train.py

draws a long-tailed detection data set in LVIS v1 format, trains a small Faster R-CNN with plain
softmax, and then, with everything but the classifier frozen, trains

- Balanced Group Softmax, started from the softmax classifier, and
- as a control, the softmax classifier itself, for as many steps on the same batches.

All three are evaluated by the official LVIS code. A table, `metrics.json`, checkpoints, the layout
of the groups and pictures go to a run folder. With `--annotations` and `--images` the same happens
on an LVIS (v0.5, v1) or COCO data set of yours.
"""

import argparse
import contextlib
import copy
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import torch
import torchvision
from detection_data import ImageError, LVISDetection, Target, collate, make_transforms
from lvis_demo_data import write_demo_data
from lvis_evaluation import (
    Metrics,
    as_results,
    check_installed,
    evaluate_boxes,
    read_frequencies,
)
from run_folder import make_run_folder, write_checkpoint, write_json, write_text
from small_detector import small_faster_rcnn
from softmax_classifier import SoftmaxClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from balanced_group_softmax import GroupLayout, category_counts
from balanced_group_softmax.adapters.torchvision import convert_classifier, convert_to_bags, freeze

CLASSIFIER = "roi_heads.box_predictor.cls_score."
WARM_UP = 20  # steps
MAX_GRADIENT_NORM = 35.0  # as the original


@dataclass
class Data:
    """What is trained and evaluated on."""

    train: LVISDetection
    val: LVISDetection
    val_annotations: Path
    counts: list[int]
    frequencies: dict[int, str]
    layout: GroupLayout

    @property
    def groups(self) -> dict[str, list[int]]:
        """Category ids by group name."""
        ids = self.train.category_ids
        named = zip(self.layout.names, self.layout.groups, strict=True)
        return {name: [ids[i] for i in members] for name, members in named}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    folder = None
    try:
        check_installed()
        device = find_device(args.device)
        folder = make_run_folder(args.output, f"torchvision-lvis-seed{args.seed}")
        data = load_data(args, folder)
    except (OSError, ValueError, ImportError) as error:
        return fail(error, folder)
    try:
        run(args, data, folder, device)
    except (OSError, ImageError, FloatingPointError) as error:
        return fail(error, folder)
    return 0


def run(args: argparse.Namespace, data: Data, folder: Path, device: torch.device) -> None:
    started = time.perf_counter()
    print(f"{describe(data, device)}\nRun folder: {folder}")
    torch.manual_seed(args.seed)

    # Stage one: the whole detector, with plain softmax.
    softmax = small_faster_rcnn(data.layout.num_categories, args.image_size).to(device)
    adam = torch.optim.AdamW(softmax.parameters(), lr=args.lr, weight_decay=1e-2)
    train(softmax, adam, data.train, args, steps=args.steps, stage=1, name="softmax")
    data.layout.save(folder / "layout.json")  # not earlier: an empty folder can be used again
    write_checkpoint(folder / "softmax.pt", softmax.state_dict())

    # Stage two: the classifier only, once with plain softmax and once with groups.
    continued = copy.deepcopy(softmax)
    bags = convert_to_bags(softmax, data.layout, args.others_ratio, inplace=False)
    for model, name in ((continued, "softmax_continued"), (bags, "bags")):
        sgd = torch.optim.SGD(
            freeze(model, train="classifier"), lr=args.finetune_lr, momentum=0.9, weight_decay=1e-4
        )
        train(model, sgd, data.train, args, steps=args.finetune_steps, stage=2, name=name)
        check_frozen(softmax, model)
        write_checkpoint(folder / f"{name}.pt", model.state_dict())
    trained = time.perf_counter() - started

    models = {"softmax": softmax, "softmax_continued": continued, "bags": bags}
    metrics = {name: evaluate(model, data, args, name) for name, model in models.items()}
    write_json(folder / "metrics.json", metrics)
    table = figures.make_table(metrics, list(data.groups))
    write_text(folder / "table.md", table)
    draw(folder, models, metrics, data)
    settings = {
        **vars(args),
        # JSON has no infinity.
        "others_ratio": args.others_ratio if math.isfinite(args.others_ratio) else "inf",
        "output": str(folder),
        "device": str(device),
        "seconds": {
            "training": round(trained, 1),
            "all": round(time.perf_counter() - started, 1),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    write_json(folder / "run.json", settings)
    print(f"\n{table}\nWritten to {folder} in {time.perf_counter() - started:.0f} s")


# --- data ---------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, folder: Path) -> Data:
    """Read the user's data, or draw the demo's."""
    if bool(args.annotations) != bool(args.images):
        raise ValueError("Expected `--annotations` and `--images` together, got only one of them")
    if bool(args.val_annotations) != bool(args.val_images):
        raise ValueError(
            "Expected `--val-annotations` and `--val-images` together, got only one of them"
        )
    if args.val_annotations and not args.annotations:
        raise ValueError("Expected `--annotations` and `--images` with `--val-annotations`")
    if args.annotations:
        paths = [args.annotations, args.images, args.val_annotations, args.val_images]
        if not args.val_annotations:
            print("No --val-annotations: evaluating on the training images.")
            paths[2:] = paths[:2]
    else:
        write_demo_data(folder / "data", args.seed, progress=True)
        paths = [folder / "data" / part for part in ("train.json", "train", "val.json", "val")]
    train_annotations, train_images, val_annotations, val_images = map(Path, paths)

    train = LVISDetection(train_annotations, train_images, transforms=make_transforms(flip=0.5))
    val = LVISDetection(val_annotations, val_images)
    if len(train) == 0 or len(val) == 0:
        raise ValueError(
            f"Expected images to train and evaluate on, got {len(train)} in {train_annotations} "
            f"and {len(val)} in {val_annotations}"
        )
    if val.category_ids != train.category_ids:
        missing, added = (
            sorted(set(a) - set(b))[:5]
            for a, b in (
                (train.category_ids, val.category_ids),
                (val.category_ids, train.category_ids),
            )
        )
        raise ValueError(
            f"Expected the category ids of {train_annotations} in {val_annotations}; ids only in "
            f"the former: {missing}, only in the latter: {added} (the first five of each)"
        )
    for dataset in (train, val):
        dataset.check_images(progress=True)
    counts = category_counts(train_annotations)
    layout = GroupLayout.from_counts(counts, category_ids=train.category_ids)
    frequencies = read_frequencies(train_annotations)
    return Data(train, val, val_annotations, counts, frequencies, layout)


def describe(data: Data, device: torch.device) -> str:
    letters = [data.frequencies[i] for i in data.train.category_ids]
    groups = ", ".join(f"{name}: {len(ids)}" for name, ids in data.groups.items())
    return (
        f"{len(data.train)} training and {len(data.val)} validation images, "
        f"{len(letters)} categories ({letters.count('r')} rare, {letters.count('c')} common, "
        f"{letters.count('f')} frequent)\n"
        f"Left out of training: {data.train.dropped['crowd']} crowd annotations, "
        f"{data.train.dropped['degenerate']} boxes thinner than a pixel\n"
        f"Groups by training instances: {groups}\n"
        f"Training on {device} with torch {torch.__version__}"
    )


def batches(
    dataset: LVISDetection, args: argparse.Namespace, stage: int
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Yield batches for ever, in an order that depends on the seed and the stage alone."""
    loader = DataLoader(
        dataset,
        args.batch_size,
        shuffle=True,
        drop_last=len(dataset) >= args.batch_size,
        collate_fn=collate,
        num_workers=args.num_workers,
        generator=torch.Generator().manual_seed(1000 * args.seed + stage),
    )
    while True:
        yield from loader


# --- training -----------------------------------------------------------------------------------


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: LVISDetection,
    args: argparse.Namespace,
    *,
    steps: int,
    stage: int,
    name: str,
) -> None:
    """Train what the optimiser holds, with a short warm-up and a cosine to zero."""
    device = next(model.parameters()).device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    data = batches(dataset, args, stage)
    model.train()
    with tqdm(total=steps, desc=f"Training {name}", unit="step") as bar:
        for step in range(steps):
            # Flips and RoIs of a step depend on seed, stage and step alone, so both classifiers
            # of stage two see the same ones, whatever else they draw.
            torch.manual_seed((args.seed * 10 + stage) * 1_000_003 + step)
            images, targets = next(data)
            losses = model(
                [image.to(device) for image in images],
                [{key: to_device(value, device) for key, value in t.items()} for t in targets],
            )
            loss = sum(losses.values())
            value = loss.item()
            if not math.isfinite(value):
                parts = ", ".join(f"{key} {part.item():g}" for key, part in losses.items())
                raise FloatingPointError(
                    f"Training {name} diverged at step {step + 1} ({parts}); try a lower --lr"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)


def check_frozen(before: nn.Module, after: nn.Module) -> None:
    """Check that stage two changed nothing but the classifier, running statistics included."""
    old, new = (
        {key: value for key, value in m.state_dict().items() if not key.startswith(CLASSIFIER)}
        for m in (before, after)
    )
    changed = sorted(old.keys() ^ new.keys())
    changed += [key for key in old.keys() & new.keys() if not torch.equal(old[key], new[key])]
    if changed:
        raise RuntimeError(f"Stage two changed frozen entries: {', '.join(changed)}")


# --- evaluation and results ---------------------------------------------------------------------


def with_same_postprocessing(model: nn.Module) -> nn.Module:
    """Return a plain detector with the post-processing that a converted one has.

    Its detections are those of torchvision, in a small part of the time: torchvision takes seconds
    for an image at LVIS's 1203 categories and a score threshold of 0.
    """
    classifier = model.get_submodule(CLASSIFIER.rstrip("."))
    if type(classifier) is not nn.Linear:
        return model
    return convert_classifier(model, SoftmaxClassifier.from_linear(classifier), inplace=False)


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, args: argparse.Namespace, name: str) -> Metrics:
    device = next(model.parameters()).device
    model = with_same_postprocessing(model)
    loader = DataLoader(data.val, args.batch_size, collate_fn=collate, num_workers=args.num_workers)
    model.eval()
    results: list[dict[str, Any]] = []
    for images, targets in tqdm(loader, desc=f"Evaluating {name}", unit="batch"):
        outputs = model([image.to(device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            results += as_results(target["image_id"], output, data.val.category_ids)
    return evaluate_boxes(
        data.val_annotations, results, groups=data.groups, frequencies=data.frequencies
    )


@torch.inference_mode()
def draw(
    folder: Path, models: dict[str, nn.Module], metrics: dict[str, Metrics], data: Data
) -> None:
    groups = data.groups
    figures.save(
        figures.plot_ap_per_group(metrics, list(groups), [len(ids) for ids in groups.values()]),
        folder / "ap_per_group.png",
    )
    norms = {
        "softmax": category_norms(models["softmax"], range(1, data.layout.num_labels)),
        "bags": category_norms(models["bags"], data.layout.tables().category_columns.tolist()),
    }
    figures.save(
        figures.plot_weight_norms(norms, data.counts, data.layout.groups),
        folder / "weight_norms.png",
    )

    # The first validation images with two rare objects, not those where one method looks well.
    rare = [data.frequencies[i] == "r" for i in data.val.category_ids]
    num_rare = [sum(rare[j - 1] for j in data.val.labels(i)) for i in range(len(data.val))]
    chosen = sorted(range(len(data.val)), key=lambda i: -min(num_rare[i], 2))[:4]
    items = [data.val[i] for i in chosen]
    columns = {}
    for name in ("softmax", "bags"):
        model = with_same_postprocessing(models[name]).eval()
        device = next(model.parameters()).device
        outputs = model([image.to(device) for image, _ in items])
        columns[figures.LABELS[name]] = [
            {key: value.cpu() for key, value in output.items()} for output in outputs
        ]
    figures.save(
        figures.plot_detections(
            items,
            columns,
            [row["name"].replace("_", " ") for row in data.val.categories],
            rare,
        ),
        folder / "detections.png",
    )


def category_norms(model: nn.Module, rows: Sequence[int]) -> Any:
    weight = model.state_dict().get(f"{CLASSIFIER}weight")
    if weight is None:
        weight = model.state_dict()[f"{CLASSIFIER}fc.weight"]
    return weight[list(rows)].norm(dim=1).cpu().numpy()


# --- command line -------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", metavar="DIR", help="new or empty run folder (default: one under runs/)")
    add("--seed", type=whole(0), default=0, help="of the drawn data and of training (default: 0)")
    data = parser.add_argument_group("your own data (default: the demo's)")
    data.add_argument("--annotations", metavar="JSON", help="training annotations, LVIS or COCO")
    data.add_argument("--images", metavar="DIR", help="folder of the training images")
    data.add_argument("--val-annotations", metavar="JSON", help="default: the training annotations")
    data.add_argument("--val-images", metavar="DIR", help="folder of the validation images")
    recipe = parser.add_argument_group("recipe")
    add = recipe.add_argument
    add("--steps", type=whole(1), default=600, help="of stage one (default: 600)")
    add("--finetune-steps", type=whole(1), default=400, help="of stage two (default: 400)")
    add("--batch-size", type=whole(1), default=8, help="images in a step (default: 8)")
    add("--lr", type=positive, default=2e-3, help="of stage one, AdamW (default: 0.002)")
    add("--finetune-lr", type=positive, default=5e-3, help="of stage two, SGD (default: 0.005)")
    add("--others-ratio", type=ratio, default=8.0, help="others per foreground (default: 8)")
    add("--image-size", type=whole(32), default=128, help="shorter side, pixels (default: 128)")
    add("--num-workers", type=whole(0), default=0, help="processes that load images (default: 0)")
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU if there is one)")
    return parser.parse_args(argv)


def whole(least: int, most: int = 2**31) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"Expected {least} to {most}, got {text}")
        return value

    parse.__name__ = "integer"  # argparse names it in its message
    return parse


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"Expected a positive number, got {text}")
    return value


def ratio(text: str) -> float:
    value = float(text)
    if not value >= 0:  # NaN is not
        raise argparse.ArgumentTypeError(f"Expected a number >= 0 or inf, got {text}")
    return value


def find_device(name: str | None) -> torch.device:
    """Return the named device, or a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"Expected `--device` to be usable, got {name!r}: {reason}") from None
    return device


def to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def fail(error: BaseException, folder: Path | None) -> int:
    """Tell the error in a line; remove the run folder, unless something is in it."""
    text = " ".join(str(error).split())
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.rmdir()
        if folder.is_dir():
            kept = ", ".join(sorted(path.name for path in folder.iterdir()))
            text += f" ({folder} keeps {kept}; remove it or give another `--output` to start again)"
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
