# %% [markdown]
# # Tutorial: a detector for the long tail
#
# We train a detector with plain softmax on a data set in which a few categories have most of the
# objects, look at what that does to the rare ones, and then give the detector a classifier that
# trains with Balanced Group Softmax (BAGS, Li et al., CVPR 2020). Everything is small: images are
# drawn, and all of it takes about a minute on one CPU core.
#
# The page is made from [examples/tutorial.py](tutorial.py), which needs
# `pip install -e ".[examples]"`. That file is a program, `python examples/tutorial.py`, and also a
# notebook for VS Code, and for Jupyter with jupytext; `jupytext --to ipynb examples/tutorial.py`
# makes an ordinary notebook of it. Its files go to a new folder `runs/tutorial`. Figures and
# pictures shown are of one run, and yours will differ a little.

# %%
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from run_folder import make_numbered_folder

SEED = 0
FOLDER = make_numbered_folder(Path("runs"), "tutorial")
torch.manual_seed(SEED)


def picture(figure: Figure, name: str, caption: str) -> Image.Image:
    """Save a figure; a notebook shows the value of a cell's last line."""
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=100, facecolor="white", metadata={"Description": caption})
    return Image.open(path)


# %% [markdown]
# ## The long tail
#
# The data set has 24 categories, each a shape in a colour, such as "red star". The most frequent
# one has 1000 objects in the training images, the rarest has three. LVIS is of this form, with
# 1203 categories. The validation images have 20 objects of each category, so that the rare ones
# can be measured too.

# %%
from detection_data import LVISDetection, make_transforms
from lvis_demo_data import COLOURS, Category, write_demo_data, zipf_counts

from balanced_group_softmax import category_counts

looks = [(shape, colour) for shape in ("disc", "triangle", "star", "cross") for colour in COLOURS]
order = torch.randperm(len(looks), generator=torch.Generator().manual_seed(1)).tolist()
instances = zipf_counts(len(looks), most=1000, least=3)
categories = [
    Category(shape, colour, count)
    for (shape, colour), count in zip([looks[i] for i in order], instances, strict=True)
]
data = FOLDER / "data"
write_demo_data(data, SEED, categories=categories, val_instances=20)

train = LVISDetection(data / "train.json", data / "train", transforms=make_transforms(flip=0.5))
val = LVISDetection(data / "val.json", data / "val")
names = [row["name"].replace("_", " ") for row in train.categories]
counts = category_counts(data / "train.json")  # in ascending order of category id
print(f"{len(train)} images for training, {len(val)} for validation, {len(counts)} categories")

# %% [markdown]
# BAGS groups the categories by these counts, with limits at 10, 100 and 1000 objects. We look at
# all results by these groups.

# %%
from figures import INK, count_range, tidy

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.counts import category_ids

layout = GroupLayout.from_counts(counts, category_ids=category_ids(data / "train.json"))
tints = ("#c8553d", "#e07a2f", "#e9b44c", "#6a994e")

figure = Figure(figsize=(8, 3.2), layout="constrained")
axes = figure.subplots()
for name, members, tint in zip(layout.names, layout.groups, tints, strict=True):
    bars = axes.bar(members, [counts[i] for i in members], color=tint, zorder=2)
    bars.set_label(f"{count_range(name)} ({len(members)})")
    axes.bar_label(bars, fontsize=7, color=INK, padding=1)
axes.set_yscale("log")
axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", size=8)
axes.set_ylabel("training objects")
tidy(axes)
axes.legend(frameon=False, title="training objects (categories)")
picture(figure, "counts", "Training objects of each category, coloured by count group")

# %% [markdown]
# ## A detector with plain softmax
#
# A small Faster R-CNN, torchvision's own but for the backbone, and with one box regression for all
# categories. Its classifier is a linear layer with 25 outputs, background and 24 categories, and
# its loss is cross-entropy. Nothing here knows of the long tail.

# %%
from detection_data import collate
from small_detector import SharedBoxRegression, small_detector
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN

EPOCHS = 2


def make_detector(num_categories: int) -> FasterRCNN:
    """Build it, with fresh weights; label 0 is background."""
    model = small_detector(
        FasterRCNN,
        num_categories,
        min_size=(96,),  # images are 128 pixels wide; 96 is faster
        max_size=192,
        box_batch_size_per_image=48,
        box_positive_fraction=1 / 3,
        box_score_thresh=0.0,  # as LVIS is evaluated: the best 300, whatever their scores
        box_detections_per_img=300,
    )
    predictor = model.roi_heads.box_predictor
    predictor.bbox_pred = SharedBoxRegression(predictor.cls_score.in_features, num_categories + 1)
    return model


detector = make_detector(len(counts))
loader = DataLoader(train, batch_size=4, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=1e-2)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=2e-3, total_steps=EPOCHS * len(loader), pct_start=0.1
)
for epoch in range(EPOCHS):
    seen = []
    for images, targets in loader:
        losses = detector(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        seen.append(losses["loss_classifier"].item())
    print(f"epoch {epoch + 1}: the classifier's loss is {sum(seen) / len(seen):.2f} on average")

# %% [markdown]
# ## What becomes of rare categories
#
# Average precision (AP) of boxes as LVIS has it, in percent, by group:

# %%
from collections.abc import Iterable

from lvis_evaluation import Metrics, as_results, evaluate_boxes
from torch import nn

ids = train.category_ids
grouped_ids = {
    name: [ids[i] for i in members]
    for name, members in zip(layout.names, layout.groups, strict=True)
}


@torch.inference_mode()
def evaluated(model: nn.Module) -> Metrics:
    """Return AP on the validation images."""
    model.eval()
    found = []
    for index in range(len(val)):
        image, target = val[index]
        found += as_results(target["image_id"], model([image])[0], ids)
    return evaluate_boxes(data / "val.json", found, groups=grouped_ids)


def line(title: str, cells: Iterable[object]) -> None:
    """Print a line of a table."""
    print(f"{title:30}", *(f"{cell:>12}" for cell in cells))


def ap_line(title: str, found: Metrics) -> None:
    line(title, [f"{found[f'AP_{name}'] or 0:.1f}" for name in layout.names])


ranges = [count_range(name) for name in layout.names]
metrics = {"softmax": evaluated(detector)}
line("training objects", ranges)
ap_line("AP, softmax", metrics["softmax"])

# %% [markdown]
# Rare categories are far behind, although they share shapes and colours with frequent ones. Is it
# the classifier? What it reads is a row of 256 features for each region (RoI) that the detector
# proposes. We compute these rows once: of the training images in two passes, each with flips of
# its own, and of the validation images. Then we look at where the probability goes that softmax
# gives to the RoIs of validation objects:

# %%
from feature_cache import roi_features
from torch import Tensor


def rois(images: LVISDetection, passes: int = 1) -> tuple[Tensor, Tensor]:
    """Return features [R, 256] and labels [R] of RoIs, sampled as in a training step."""
    detector.eval()
    rows = []
    for _ in range(passes):
        for batch in DataLoader(images, batch_size=8, collate_fn=collate):
            rows += roi_features(detector, *batch)
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


features, labels = rois(train, passes=2)
val_features, val_labels = rois(val)
softmax = detector.roi_heads.box_predictor.cls_score
group_of = layout.tables().label_groups  # of each label: 0 for background, then 1, 2, ...

kinds = ("right category", "others of its group", "other groups", "background")
shares = torch.zeros(len(kinds), len(ranges))
with torch.inference_mode():
    probabilities = softmax(val_features).softmax(dim=1)
for group in range(1, layout.num_groups):
    mine = group_of[val_labels] == group
    mean = probabilities[mine].mean(dim=0)
    right = probabilities[mine].gather(1, val_labels[mine, None]).mean()
    same, background = mean[group_of == group].sum(), mean[0]
    parts = torch.stack([right, same - right, 1 - same - background, background])
    shares[:, group - 1] = parts
line("training objects", ranges)
line("right category", [f"{share:.2f}" for share in shares[0].tolist()])

figure = Figure(figsize=(8, 2.6), layout="constrained")
axes = figure.subplots()
left = torch.zeros(len(ranges))
for kind, part, tint in zip(
    kinds, shares, ("#e07a2f", "#f3c9a5", "#8d99ae", "#d9dce3"), strict=True
):
    axes.barh(ranges, part, left=left, color=tint, label=kind, zorder=2)
    left += part
axes.invert_yaxis()
axes.set_xlim(0, 1)
axes.set_xlabel("mean probability")
axes.set_ylabel("training objects")
tidy(axes)
axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
picture(
    figure, "shares", "The probability that plain softmax gives to validation objects, by group"
)

# %% [markdown]
# An object of a rare category hardly gets any probability for it. Most goes to more frequent ones
# and to background.
#
# The reason is in the gradient of cross-entropy. A row of a category pulls the category's logit up,
# by 1 minus its probability. Every other row, of background or of another category, pushes it down
# by the probability. Over all rows, for the categories of each group:


# %%
from torch.nn import functional as F


def pull_and_push(logits: Tensor, loss: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return how the gradient of a loss moves each category's logit: up, and down, [C] each."""
    (gradient,) = torch.autograd.grad(loss, logits)
    own = F.one_hot(labels, layout.num_labels)[:, layout.foreground]
    by_row = -gradient[:, columns]
    return (by_row * own).sum(dim=0), -(by_row * (1 - own)).sum(dim=0)


def grouped(values: Tensor) -> Tensor:
    return torch.stack([values[list(members)].sum() for members in layout.groups])


columns = torch.arange(1, layout.num_labels)
ratios = {}
line("training objects", ranges)
for title, logits in {
    "pull / push, at the start": torch.zeros(len(labels), layout.num_labels),
    "pull / push, after training": softmax(features).detach(),
}.items():
    logits.requires_grad_()
    pull, push = pull_and_push(logits, F.cross_entropy(logits, labels), columns)
    ratios[title] = pull / push
    line(title, [f"{value:.2f}" for value in grouped(pull) / grouped(push)])

STEP = 8 * 48  # rows of a step of 8 images
steps = labels[torch.randperm(len(labels))].split(STEP)
absent = torch.stack([torch.bincount(step, minlength=layout.num_labels) == 0 for step in steps])
share = absent.float().mean(dim=0)[layout.foreground]
line("steps with push alone", [f"{share[list(members)].mean():.0%}" for members in layout.groups])

# %% [markdown]
# At the start all labels are equally likely, so a rare category is pushed down far more than it is
# pulled up, and most steps do nothing else to it. A push is weaker the lower the probability is. So
# the score falls until pull and push are of about one size, as they are after training. For rare
# categories that is at the low scores of the picture above.
#
# ## Groups
#
# BAGS lets categories compete only with those that are about as frequent. Each group has a softmax
# of its own, over its categories and one more column, `others`, for all that belongs elsewhere. One
# more group, `bg_fg`, tells background from foreground.

# %%
print(f"{'group':10}{'columns':>10}  content")
for name, start, size in zip(
    layout.group_names, layout.group_starts, layout.group_sizes, strict=True
):
    content = "background, foreground" if name == "bg_fg" else f"others, {size - 1} categories"
    print(f"{name:10}{f'{start} to {start + size - 1}':>10}  {content}")
print(f"{layout.num_logits} logits for {layout.num_labels} labels\n")

line("the label in each group", layout.group_names)
for label in (0, len(counts), len(counts) - 1, 1):
    title = f"{names[label - 1]} ({counts[label - 1]} objects)" if label else "background"
    line(title, layout.bin_labels[:, label].tolist())

# %% [markdown]
# In a group of categories 0 is `others`. The rarest category is `others` in three groups and counts
# as foreground in `bg_fg`.
#
# Most rows of a step are `others` in most groups, and would drown the group's own. So not all of
# them count. For each row of the group itself eight of the others are drawn, anew in each step, and
# none if it has no row. `sample_others` makes this draw. For the rows of one step:

# %%
from matplotlib.colors import ListedColormap

from balanced_group_softmax import sample_others

step = steps[0][steps[0].argsort(descending=True)]
counting = sample_others(step, layout, generator=torch.Generator().manual_seed(0))  # [R, G]
own = layout.bin_labels[:, step].T > 0
line("rows of the step", layout.group_names)
line("of the group itself", own.sum(dim=0).tolist())
line("others that count", (counting & ~own).sum(dim=0).tolist())

figure = Figure(figsize=(8, 2.4), layout="constrained")
axes = figure.subplots()
shown = counting.int() + (counting & own).int()
axes.imshow(
    shown.T,
    cmap=ListedColormap(["#edf0f5", "#8d99ae", "#e07a2f"]),
    aspect="auto",
    interpolation="nearest",
)
axes.set_yticks(range(layout.num_groups), layout.group_names)
axes.set_xlabel("rows of a step: the rarest category first, background last")
axes.tick_params(length=0)
for tint, text in (
    ("#e07a2f", "of the group itself (bg_fg: foreground)"),
    ("#8d99ae", "others that count (bg_fg: background)"),
    ("#edf0f5", "does not count"),
):
    axes.scatter([], [], color=tint, marker="s", label=text)
figure.legend(frameon=False, ncols=3, loc="outside upper center", fontsize=9)
picture(figure, "others", "Which rows of a training step count in which group")

# %% [markdown]
# Pull and push at the start once more, now for the loss of BAGS. In each group it starts anew, and
# frequent groups are no longer ahead of rare ones by orders of magnitude:

# %%
from balanced_group_softmax import grouped_softmax_loss

logits = torch.zeros(len(labels), layout.num_logits, requires_grad=True)
loss = grouped_softmax_loss(logits, labels, layout)
pull, push = pull_and_push(logits, loss, layout.tables().category_columns.long())
ratios["BAGS"] = pull / push
line("training objects", ranges)
line("pull / push, BAGS", [f"{value:.2f}" for value in grouped(pull) / grouped(push)])

figure = Figure(figsize=(8, 3), layout="constrained")
axes = figure.subplots()
for title, values, tint in (
    ("softmax", ratios["pull / push, at the start"], "#5b6b8c"),
    ("balanced group softmax", ratios["BAGS"], "#e07a2f"),
):
    axes.scatter(counts, values, color=tint, label=title, s=22, zorder=2)
axes.set_xscale("log")
axes.set_yscale("log")
axes.set_xlabel("training objects of the category")
axes.set_ylabel("pull / push at the start")
tidy(axes)
axes.legend(frameon=False)
picture(figure, "pull_and_push", "Pull over push at the start for each category, by its count")

# %% [markdown]
# ## The new classifier
#
# `convert_to_bags` replaces the detector's classifier by a `BAGSHead` that starts from the trained
# rows of the old one (`BAGSHead.from_linear`). `freeze` keeps all else as it is. The control is the
# softmax classifier itself, trained on for as long, since a gain over the first detector could come
# from longer training alone. In a step of your training loop there is now a loss for each group:

# %%
from balanced_group_softmax.adapters.torchvision import (
    convert_classifier,
    convert_to_bags,
    freeze,
)
from balanced_group_softmax.rebalance.softmax import SoftmaxClassifier


def converted() -> dict[str, FasterRCNN]:
    """Return the detector with a classifier to train on, and all else frozen."""
    models = {
        "softmax_continued": convert_classifier(
            detector, SoftmaxClassifier.from_linear(softmax), inplace=False
        ),
        "bags": convert_to_bags(detector, layout, inplace=False),
    }
    for model in models.values():
        freeze(model, train="classifier")
    return models


models = converted()
for key, model in models.items():
    losses = model.train()(*next(iter(loader)))
    print(f"{key}: {', '.join(name for name in losses if 'cls' in name)}")

# %% [markdown]
# Everything before the classifier is frozen, so it can just as well train from the rows that we
# have, which takes a second. (`--cache-features` of
# [the training script](../docs/training.md#features-once-instead-of-the-detector-every-step) does
# this for data of your own.) Both classifiers see the same rows in the same order. The learning
# rate is that of the original, 0.01 for 16 images a step.

# %%
from typing import Any


def train_classifier(model: nn.Module, rate: float, steps: int = 400) -> None:
    """Train a detector's classifier on the stored rows."""
    classifier: Any = model.get_submodule("roi_heads.box_predictor.cls_score")
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(labels), (STEP,), generator=generator)
        optimizer.zero_grad()
        classifier.loss(classifier(features[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()


for key, model in models.items():
    train_classifier(model, rate=0.005)
    metrics[key] = evaluated(model)

before, after = detector.state_dict(), models["bags"].state_dict()
outside = [key for key in before if not key.startswith("roi_heads.box_predictor.cls_score.")]
changed = sum(not torch.equal(before[key], after[key]) for key in outside)
print(f"{changed} of {len(outside)} entries outside the classifier have changed")

# %% [markdown]
# ## Results

# %%
from figures import LABELS, plot_ap_per_group

line("training objects", ranges)
for key, found in metrics.items():
    ap_line(f"AP, {LABELS[key]}", found)
figure = plot_ap_per_group(metrics, layout.names, [len(members) for members in layout.groups])
picture(figure, "ap_per_group", "AP by count group: softmax, softmax continued, BAGS")

# %% [markdown]
# Rare categories gain from BAGS what they do not gain from training plain softmax on, and the
# features are the same. What to keep in mind:
#
# - This is one run with ten rare categories and an undertrained detector. With a `SEED` of 1, 2 and
#   3, AP of categories with fewer than 10 objects is 7.3, 6.1 and 3.7 above the control's. AP of
#   the only category with 1000 is 1.0 and 4.5 below it in two of these runs, and 1.2 above it in
#   the third. [The demo](../docs/demo.md) has five seeds of a larger detector and data set, and
#   [the study](../docs/study.md) other methods.
# - The learning rate matters. At four times the rate plain softmax, too, learns more of the rare
#   categories, so part of the difference was one of speed:

# %%
line("training objects", ranges)
for key, model in converted().items():
    train_classifier(model, rate=0.02)
    ap_line(f"AP, {LABELS[key]}", evaluated(model))

# %% [markdown]
# ## Scores
#
# At test `others` is dropped. The score of a category is its probability in its group, times that
# of foreground. For one RoI of a rare object, the one whose right category scores highest:

# %%
head = models["bags"].roi_heads.box_predictor.cls_score
with torch.inference_mode():
    logits = head(val_features)
    scores = head.scores(logits)
right_scores = scores.gather(1, val_labels[:, None])[:, 0]
row = int(torch.where(group_of[val_labels] == 1, right_scores, 0).argmax())
label = int(val_labels[row])

first, size = layout.group_starts[1], layout.group_sizes[1]
foreground = logits[row, :2].softmax(dim=0)[1].item()
inside = logits[row, first : first + size].softmax(dim=0)[layout.bin_labels[1, label]].item()
print(f"{names[label - 1]}: {foreground:.3f} * {inside:.3f} = {foreground * inside:.3f}")
print(f"head.scores has {scores[row, label]:.3f}; softmax had {probabilities[row, label]:.3f}")

# %% [markdown]
# The scores go to non-maximum suppression by category as they are. On the validation image with the
# most rare objects:

# %%
from figures import plot_detections

rare = [count < 10 for count in counts]
rare_objects = [sum(rare[label - 1] for label in val.labels(i).tolist()) for i in range(len(val))]
items = [val[rare_objects.index(max(rare_objects))]]
images = [image for image, _ in items]
with torch.inference_mode():
    outputs = {LABELS[key]: model.eval()(images) for key, model in models.items()}
figure = plot_detections(items, outputs, names, rare, score_threshold=0.1)
picture(figure, "detections", "Detections of the control and of BAGS on a validation image")

# %% [markdown]
# ## Saving and loading
#
# The state dict holds the layout, so a checkpoint is enough to build the detector again: first the
# plain detector, then the conversion, then the weights.

# %%
torch.save(models["bags"].state_dict(), FOLDER / "bags.pt")

state = torch.load(FOLDER / "bags.pt", weights_only=True)
saved_layout = GroupLayout.from_state_dict(state)
loaded = convert_to_bags(make_detector(saved_layout.num_categories), saved_layout)
loaded.load_state_dict(state)

with torch.inference_mode():
    ours, theirs = models["bags"](images)[0], loaded.eval()(images)[0]
print("same layout:", saved_layout == layout)
print("same detections:", all(torch.equal(ours[key], theirs[key]) for key in ours))

# %% [markdown]
# ## Where to go next
#
# - Your torchvision detector, on LVIS or data of your own: [training](../docs/training.md). For
#   other frameworks [mmdet 3](../docs/mmdet.md) and [detectron2](../docs/detectron2.md).
# - What is computed, to the letter: [the method](../docs/method.md).
# - Classification, without background: `GroupLayout.from_counts(counts, background=None)`, and
#   [examples/classification.py](classification.py).
# - Whether it is the best method for you: [methods](../docs/methods.md) and
#   [study](../docs/study.md).
