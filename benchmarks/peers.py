"""What one would write, or install, instead: the alternatives that losses are measured against.

- `original`: the loop over groups of the method's first implementation, with its way of working:
  integer weights, `nonzero`, a NumPy draw without replacement on the host, group bounds read from
  the device, cross-entropy of every row of a group, weighted afterwards;
- `loop`: the same loss as a loop over groups that never waits for the host, and the same through
  `torch.compile`;
- `dense`: plain cross-entropy over the same logits (another loss: what a softmax costs), from
  PyTorch, Liger-Kernel and QuACK.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from profiles import Profile
from records import brief
from torch import Tensor

from balanced_group_softmax import grouped_softmax_loss
from balanced_group_softmax.ops.dispatch import Impl

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A loss of logits [R, L] and labels [R]."""

    name: str
    loss: Loss
    grouped: bool
    """Whether it is the grouped loss; otherwise it is a cross-entropy of the whole row."""
    overwrites: bool = False
    """Whether it writes its gradient over the logits, so that it needs its own."""
    compiled: bool = False


@dataclass(frozen=True)
class Columns:
    """What the loops read, on the device of the logits."""

    slices: Tensor
    """int64 [G, 2]: first column and number of columns."""
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    bin_labels: Tensor

    @classmethod
    def of(cls, profile: Profile, device: torch.device) -> "Columns":
        layout = profile.layout
        slices = torch.tensor([layout.group_starts, layout.group_sizes]).T.contiguous()
        return cls(
            slices.to(device),
            layout.group_starts,
            layout.group_sizes,
            profile.bin_labels.to(device),
        )


def original_loss(logits: Tensor, labels: Tensor, columns: Columns, ratio: float) -> Tensor:
    """The loss as the original computes it, waits for the host included."""
    logits = logits.float()
    losses = []
    for group in range(len(columns.slices)):
        target = columns.bin_labels[group][labels]
        if group == 0:
            weight = torch.ones_like(target)
        else:
            weight = (target > 0).long()
            found = weight.nonzero(as_tuple=True)[0].shape[0]
            if found:
                others = (1 - weight).nonzero(as_tuple=True)[0]
                keep = int(ratio * found) if math.isfinite(ratio) else len(others)
                if keep >= len(others):
                    weight = torch.ones_like(target)
                else:
                    drawn = np.random.choice(others.cpu().numpy(), keep, replace=False)
                    weight[torch.from_numpy(drawn).to(weight.device)] = 1
        normalizer = max(weight.sum().float().item(), 1.0)
        start, size = int(columns.slices[group, 0]), int(columns.slices[group, 1])
        every = F.cross_entropy(logits.narrow(1, start, size), target, reduction="none")
        losses.append((every * weight.float()).sum() / normalizer)
    return torch.stack(losses).sum()


def loop_loss(logits: Tensor, labels: Tensor, columns: Columns, ratio: Tensor) -> Tensor:
    """The loss as a loop over groups that leaves every number on the device."""
    total = logits.new_zeros((), dtype=torch.float32)
    for group, (start, size) in enumerate(zip(columns.starts, columns.sizes, strict=True)):
        target = columns.bin_labels[group][labels]
        if group == 0:
            weight = torch.ones_like(target, dtype=torch.float32)
        else:
            inside = target > 0
            found = inside.sum()
            keep = (found * ratio).nan_to_num(0.0).clamp(max=len(labels)).long()
            # Sorting puts the group's own rows last, so ranks below `keep` are drawn others.
            keys = torch.rand(len(labels), device=labels.device) + 2 * inside
            ranks = torch.empty_like(target)
            ranks[keys.argsort()] = torch.arange(len(labels), device=labels.device)
            weight = ((inside | (ranks < keep)) & (found > 0)).float()
        every = F.cross_entropy(logits[:, start : start + size].float(), target, reduction="none")
        total = total + (every * weight).sum() / weight.sum().clamp(min=1)
    return total


def loss_peers(
    profile: Profile, ratio: float, device: torch.device, impls: list[Impl], *, compiled: bool
) -> tuple[list[Peer], dict[str, str]]:
    """Ours and the alternatives that run on the device; of the others, why they do not."""
    columns = Columns.of(profile, device)
    loop = partial(
        loop_loss,
        columns=columns,
        ratio=torch.tensor(ratio, dtype=torch.float64, device=device),
    )
    skipped: dict[str, str] = {}
    peers: list[Peer] = []
    for impl in impls:
        if why_not := why_not_timed(impl, device):
            skipped[f"bags ({impl})"] = why_not
            continue
        ours = partial(grouped_softmax_loss, layout=profile.layout, others_ratio=ratio, impl=impl)
        peers.append(Peer(f"bags ({impl})", ours, grouped=True))
    peers.append(
        Peer("original", partial(original_loss, columns=columns, ratio=ratio), grouped=True)
    )
    peers.append(Peer("loop", loop, grouped=True))
    if compiled:
        peers.append(Peer("loop, compiled", torch.compile(loop), grouped=True, compiled=True))
    else:
        skipped["loop, compiled"] = "takes long to compile; --compile asks for it"
    peers.append(Peer("dense", F.cross_entropy, grouped=False))
    peers += _installed(device, skipped)
    return [peer for peer in peers if _runs(peer, profile, device, skipped)], skipped


def why_not_timed(impl: str, device: torch.device) -> str:
    """Why one of our implementations is left out; nothing if it is not."""
    if impl == "triton" and device.type != "cuda":
        return "needs a GPU; interpreted kernels are not timed"
    return ""


def _installed(device: torch.device, skipped: dict[str, str]) -> Iterator[Peer]:
    """Cross-entropy from other packages, which are not installed with this one."""
    for name, package, load in (
        ("dense, Liger", "liger-kernel", _liger),
        ("dense, QuACK", "quack-kernels", _quack),
    ):
        if device.type != "cuda":
            skipped[name] = f"{package} needs a GPU"
            continue
        try:
            loss = load()
        except Exception as error:  # what a package raises where it cannot serve is its own affair
            skipped[name] = f"pip install {package}: {brief(error)}"
        else:
            yield Peer(name, loss, grouped=False, overwrites=load is _liger)


def _liger() -> Loss:
    loss: Loss = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss()
    return loss


def _quack() -> Loss:
    loss: Loss = importlib.import_module("quack").cross_entropy
    return loss


def _runs(peer: Peer, profile: Profile, device: torch.device, skipped: dict[str, str]) -> bool:
    """Whether a loss can be computed at all; if not, the reason goes to `skipped`."""
    if peer.compiled:
        return True  # compiled for the sizes that are measured, not for this one
    logits = torch.zeros(8, profile.num_logits, device=device, requires_grad=True)
    try:
        peer.loss(logits, torch.zeros(8, dtype=torch.int64, device=device)).backward()
    except Exception as error:
        skipped[peer.name] = brief(error)
        return False
    return True


def agreement(peer: Peer, model: Peer, logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """How far loss and gradient lie from another's: relative to the loss, to the largest entry."""
    found = []
    for each in (peer, model):
        own = logits.detach().clone().requires_grad_()
        value = each.loss(own, labels)
        gradient = torch.autograd.grad(value, own)[0].double()
        found.append((float(value.detach()), gradient))
    (loss, gradient), (expected, expected_gradient) = found
    return (
        abs(loss - expected) / max(abs(expected), 1.0),
        float((gradient - expected_gradient).abs().max() / expected_gradient.abs().max()),
    )


def merge_as_original(
    logits: Tensor, slices: Tensor, categories: list[Tensor], num_labels: int
) -> Tensor:
    """Scores as the original puts its groups together, for all proposals at once.

    Args:
        logits: [R, L].
        slices: int64 [G, 2] on the device, first column and number of columns of each group.
        categories: of each group after the first, its labels in the order of its columns.
        num_labels: categories and background, which is label 0.
    """
    logits = logits.float()
    groups = []
    for group in range(len(slices)):
        start, size = int(slices[group, 0]), int(slices[group, 1])
        groups.append(F.softmax(logits.narrow(1, start, size), dim=1))
    # The original makes both on the host and moves them.
    foreground = torch.zeros(len(logits), num_labels).to(logits.device)
    merged = torch.zeros(len(logits), num_labels).to(logits.device)
    for labels, probabilities in zip(categories, groups[1:], strict=True):
        foreground[:, labels] = probabilities[:, 1:]
    foreground = groups[0].narrow(1, 1, 1) * foreground
    merged[:, 0] = groups[0][:, 0]
    merged[:, 1:] = foreground[:, 1:]
    return merged


def score_arguments(profile: Profile, device: torch.device) -> dict[str, Any]:
    """What `merge_as_original` needs of a layout."""
    categories = [
        (places > 0).nonzero(as_tuple=True)[0].to(device) for places in profile.bin_labels[1:]
    ]
    columns = Columns.of(profile, device)
    return {
        "slices": columns.slices,
        "categories": categories,
        "num_labels": profile.layout.num_labels,
    }
