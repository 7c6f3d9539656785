"""What is said of a run: the figures of its detectors, tables, pictures, and images left out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import distributed
import figures
import torch
from checkpoints import Checkpoint
from detecting import detect
from detection_data import ImageError
from detectors import category_norms, with_same_postprocessing
from evaluation_report import make_table
from ground_truth import read_ground_truth
from lvis_evaluation import Metrics, choose_method, evaluate
from recipe import Recipe
from results_files import read_results
from resuming import BROKEN_IMAGES, note_broken
from run_folder import partial_path
from stages import BAGS, SOFTMAX, Setting
from torch import nn
from training import AUTOCAST


def layout_of(setting: Setting) -> Any:
    return setting.data.categories.layout(setting.recipes["bags"].thresholds)


def groups_of(setting: Setting) -> dict[str, list[int]]:
    """Return category ids by group name."""
    layout, ids = layout_of(setting), setting.data.categories.ids
    named = zip(layout.names, layout.groups, strict=True)
    return {name: [ids[i] for i in members] for name, members in named}


def evaluated(setting: Setting, name: str, model: nn.Module) -> Metrics:
    """Return the figures of a detector, on the first process; those of masks as `segm_AP`, ..."""
    recipe = setting.recipe(name)
    path = partial_path(setting.folder / f"{name}.json")
    path = Path(distributed.from_first(str(path)))
    try:
        broken = detect(
            model,
            setting.data.val,
            path,
            batch_size=recipe.batch_size,
            device=setting.device,
            num_workers=setting.num_workers,
            autocast=AUTOCAST.get(recipe.amp),
            skip_broken=setting.skip_broken,
            title=f"Evaluating {name}",
        )
        note_broken(setting.folder, setting.broken, broken)
        metrics: Metrics = {}
        if distributed.is_first():
            metrics = figures_of(path, setting, recipe)
    finally:
        if distributed.is_first():
            path.unlink(missing_ok=True)
    distributed.barrier()
    return metrics


def figures_of(path: Path, setting: Setting, recipe: Recipe) -> Metrics:
    """Return the figures of a file of detections."""
    masks = recipe.detector == "mask_rcnn"
    categories = setting.data.categories
    truth = read_ground_truth(
        setting.data.val_annotations,
        masks=masks,
        frequencies=dict(zip(categories.ids, categories.frequencies, strict=True)),
    )
    results = read_results(path, truth.file_image_ids, truth.file_category_ids)
    metrics: Metrics = {}
    for kind in ("bbox", "segm") if masks else ("bbox",):
        found = evaluate(
            truth, results, kind, groups=groups_of(setting), method=choose_method("fast")
        )
        prefix = "" if kind == "bbox" else "segm_"
        metrics |= {f"{prefix}{key}": value for key, value in found.items()}
    return metrics


def tables(setting: Setting, metrics: Mapping[str, Metrics]) -> str:
    """Return the figures as Markdown: methods side by side, or of one the original's table."""
    names = list(groups_of(setting))
    kinds = [kind for kind, key in (("bbox", "AP"), ("segm", "segm_AP")) if key in _any(metrics)]
    parts = []
    for kind in kinds:
        prefix = "" if kind == "bbox" else "segm_"
        own = {
            name: {
                key.removeprefix(prefix): value
                for key, value in values.items()
                if key.startswith(prefix)
            }
            for name, values in metrics.items()
        }
        if len(metrics) > 1:
            title = "" if len(kinds) == 1 else f"{kind}:\n\n"
            parts.append(title + figures.make_table(own, names))
        else:
            parts += [make_table(values, kind, names) + "\n" for values in own.values()]
    return "\n".join(parts)


def _any(metrics: Mapping[str, Metrics]) -> Metrics:
    return next(iter(metrics.values()))


def report_epoch(setting: Setting, name: str, model: nn.Module, epoch: int) -> None:
    """Evaluate in the middle of training."""
    metrics = evaluated(setting, name, model)
    if distributed.is_first():
        shown = ", ".join(
            f"{key} {value:.2f}"
            for key in ("AP", "APr", "APc", "APf", "segm_AP")
            if (value := metrics.get(key)) is not None
        )
        print(f"{name} after epoch {epoch}: {shown}")


def report_broken(setting: Setting) -> None:
    """Tell which images could not be read."""
    if setting.broken:
        print(
            f"{len(setting.broken)} images could not be read, such as {next(iter(setting.broken))};"
            f" all of them: {setting.folder / BROKEN_IMAGES}"
        )


@torch.inference_mode()
def draw(
    setting: Setting, checkpoints: Mapping[str, Checkpoint], metrics: Mapping[str, Metrics]
) -> None:
    """Draw AP by group, weight norms, and detections of some images."""
    groups, data, folder = groups_of(setting), setting.data, setting.folder
    layout = layout_of(setting)
    figures.save(
        figures.plot_ap_per_group(metrics, list(groups), [len(ids) for ids in groups.values()]),
        folder / "ap_per_group.png",
    )
    norms = {
        "softmax": category_norms(checkpoints[SOFTMAX].model, range(1, layout.num_labels)),
        "bags": category_norms(checkpoints[BAGS].model, layout.tables().category_columns.tolist()),
    }
    figures.save(
        figures.plot_weight_norms(norms, data.categories.counts, layout.groups),
        folder / "weight_norms.png",
    )

    # The first validation images with two rare objects, not those where one method looks well.
    rare = [letter == "r" for letter in data.categories.frequencies]
    num_rare = [sum(rare[j - 1] for j in data.val.labels(i)) for i in range(len(data.val))]
    chosen = sorted(range(len(data.val)), key=lambda i: -min(num_rare[i], 2))[:4]
    items = []
    for i in chosen:
        with contextlib.suppress(ImageError):  # which was told already, or has ended the run
            items.append(data.val[i])
    columns = {}
    for name in (SOFTMAX, BAGS):
        model = with_same_postprocessing(checkpoints[name].make_model()).to(setting.device).eval()
        outputs = model([image.to(setting.device) for image, _ in items])
        columns[figures.LABELS[name]] = [
            {key: value.cpu() for key, value in output.items()} for output in outputs
        ]
    figures.save(
        figures.plot_detections(
            items, columns, [name.replace("_", " ") for name in data.categories.names], rare
        ),
        folder / "detections.png",
    )
