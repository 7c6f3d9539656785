"""Modules whose checkpoints say what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from balanced_group_softmax._arguments import shown
from balanced_group_softmax.layout import Background

FORMAT_NAME = "balanced_group_softmax.rebalance"
FORMAT_VERSION = 1
EXTRA_STATE = "_extra_state"


class DescribedModule(nn.Module):
    """A classifier that keeps its method's name and settings in its state dict.

    They are `_extra_state`, a uint8 tensor of JSON. Loading a checkpoint of another method, another
    number of categories, another label convention, other shapes, or another setting that scores
    depend on raises ValueError before anything of the module is copied. Settings of training alone
    stay those of the object that loads.
    """

    num_categories: int
    background: Background

    def settings(self) -> dict[str, Any]:
        """The method's own arguments, as JSON can hold them."""
        return {}

    def score_settings(self) -> tuple[str, ...]:
        """Names of the settings that `scores` depends on."""
        return ()

    def describe(self) -> dict[str, Any]:
        """What the extra state holds: the method's name, sizes and settings."""
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "method": type(self).__name__,
            "num_categories": self.num_categories,
            "background": self.background,
            "settings": self.settings(),
        }

    def get_extra_state(self) -> Tensor:
        """The description, for the state dict."""
        return torch.frombuffer(bytearray(json.dumps(self.describe()), "utf-8"), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: descriptions were compared before loading began."""

    def check_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Raise ValueError if the entries under `prefix` are of another classifier.

        Loading does so by itself before it copies anything of the module; a whole detector calls it
        before it copies any weight. Entries that are absent are no concern of it.
        """
        if prefix + EXTRA_STATE in state_dict:
            mine = json.loads(json.dumps(self.describe()))
            theirs = read_description(state_dict, prefix)
            compared = [(key, mine[key], theirs[key]) for key in _STRUCTURE]
            compared += [
                (name, mine["settings"][name], theirs["settings"].get(name))
                for name in self.score_settings()
            ]
            differing = [
                f"{name} {shown(value)} instead of {shown(ours)}"
                for name, ours, value in compared
                if value != ours
            ]
            if differing:
                raise ValueError(
                    f"The checkpoint's {prefix or 'classifier.'}* has {'; '.join(differing)}. "
                    f"Make the classifier with `from_state_dict`, or copy its tensors alone"
                )
        for name, ours in [*self.named_parameters(), *self.named_buffers()]:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != ours.shape:
                raise ValueError(
                    f"Expected {prefix}{name} of shape {list(ours.shape)}, got "
                    f"{list(value.shape)} in the checkpoint"
                )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.check_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


_STRUCTURE = ("method", "num_categories", "background")


def read_description(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The description under a prefix of a checkpoint, checked."""
    where = f"{prefix}{EXTRA_STATE}"
    state = state_dict.get(where)
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError(f"Expected {where} of the checkpoint to describe a classifier, got none")
    text = bytes(state.cpu().tolist()).decode("utf-8", errors="replace")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT_NAME:
        raise ValueError(f"Expected {where} to describe a classifier, got {shown(text)}")
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"Expected {where} of format version {FORMAT_VERSION}, got {shown(version)}: it was "
            f"written by another version of the library"
        )
    missing = {*_STRUCTURE, "settings"} - about.keys()
    if missing or not isinstance(about["settings"], dict):
        raise ValueError(f"Expected {where} with {sorted(missing) or 'settings'}, found none")
    return about


def description_of(
    method: type[DescribedModule], state_dict: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """The description under a prefix; ValueError if it is of another method."""
    about = read_description(state_dict, prefix)
    if about["method"] != method.__name__:
        raise ValueError(
            f"Expected a checkpoint of {method.__name__}, got one of {about['method']}"
        )
    return about


def matrix_of(state_dict: Mapping[str, Any], key: str) -> Tensor:
    """An entry that has to be a matrix."""
    value = state_dict.get(key)
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise ValueError(f"Expected a matrix {key} in the checkpoint, got none")
    return value


def load_under(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Load the entries under a prefix."""
    wanted = [key for key in module.state_dict() if prefix + key in state_dict]
    module.load_state_dict({key: state_dict[prefix + key] for key in wanted})
