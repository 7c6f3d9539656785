"""Which category is in which group, and which logit column is whose."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax import layout_json
from balanced_group_softmax._arguments import as_int_array, as_int_tuple, as_tuple, shown
from balanced_group_softmax._files import written_whole
from balanced_group_softmax.tables import GroupTables

Background = Literal["first", "last"] | None

BACKGROUND_GROUP = "bg_fg"

# Far above any data set there is (V3Det has 13,204 categories), far below what hurts.
MAX_CATEGORIES = 1 << 20
MAX_TABLE_ENTRIES = 1 << 28  # of `bin_labels`, [G, num_labels]


@dataclass(frozen=True, repr=False)
class GroupLayout:
    r"""The groups of Balanced Group Softmax and the columns of its logits.

    Group 0 has the two columns `[background, foreground]`; it does not exist when `background`
    is None. Each later group has a column `others` first, then its categories in ascending
    order. With `C` categories in `G` groups (group 0 included) a row has `L` logits:

    .. math:: L = 2 + \sum_{g=1}^{G-1} (1 + n_g) = C + 1 + G

    (`L = C + G` without background). Usually made by `from_counts`. A layout is immutable,
    hashable and holds no tensors.

    Args:
        groups: for each group of categories, the 0-based positions of its categories in
            ascending category order, ascending. Together they hold 0..C-1 once each. An empty
            group is allowed here (layouts of the original have them) and keeps its column
            `others`.
        names: one name for each of these groups, such as `"10_100"`.
        background: where the label convention puts background: `"first"` (label 0, categories
            1..C: torchvision, the original), `"last"` (categories 0..C-1, background C: mmdet,
            detectron2), or None for classification without background. It moves labels and
            score columns; the logit columns do not depend on it.
        category_ids: the data set's ids of the categories, ascending, if known.

    Raises:
        TypeError: if an argument is not of the type above.
        ValueError: if the groups are not a partition of 0..C-1, a name is empty, repeated or
            has a dot, or the layout is of absurd size.

    Source: Li et al., CVPR 2020, section 4.1.

    Example:
        >>> layout = GroupLayout.from_counts([3, 2500, 40, 7, 600])
        >>> layout.group_names
        ('bg_fg', '0_10', '10_100', '100_1000', '1000_inf')
        >>> layout.group_sizes, layout.num_logits
        ((2, 3, 2, 2, 2), 11)
        >>> layout.bin_labels[1].tolist()  # group 0_10 sees others, category 0, ..., category 3
        [0, 1, 0, 0, 2, 0]
    """

    groups: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    background: Background = "first"
    category_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        # A cache, not a field: equality, hash, copies and pickles do not know it.
        object.__setattr__(self, "_tables_by_device", {})
        _check_background(self.background)
        groups = tuple(
            as_int_tuple(group, f"groups[{index}]")
            for index, group in enumerate(as_tuple(self.groups, "groups"))
        )
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "names", as_tuple(self.names, "names"))
        if self.category_ids is not None:
            ids = as_int_tuple(self.category_ids, "category_ids")
            object.__setattr__(self, "category_ids", ids)
        self._check_groups()
        self._check_names()
        self._check_category_ids()

    @classmethod
    def from_counts(
        cls,
        counts: Sequence[int] | np.ndarray | Tensor,
        thresholds: Sequence[int] = (10, 100, 1000),
        background: Background = "first",
        category_ids: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> GroupLayout:
        """Group categories by how many training instances they have.

        With thresholds `(10, 100, 1000)` the groups are [0, 10), [10, 100), [100, 1000) and
        [1000, inf), named `0_10`, `10_100`, `100_1000` and `1000_inf`. A category that was
        never seen is in the lowest group. A group without categories is left out.

        Args:
            counts: training instances of each category, C integers, in ascending category id
                (or in the order of `category_ids`).
            thresholds: boundaries between groups, in instances: positive and ascending. Empty
                means one group.
            background: as for `GroupLayout`.
            category_ids: the ids that `counts` belong to. Unsorted ids are sorted, together
                with their counts.

        Raises:
            TypeError: if counts, thresholds or ids are not integers.
            ValueError: if counts are empty, negative or not one-dimensional, thresholds are not
                positive and strictly ascending, or ids are repeated or not as many as counts.
        """
        count_array = as_int_array(counts, "counts")
        if count_array.size == 0:
            raise ValueError("Expected `counts` of at least one category, got none")
        if count_array.size > MAX_CATEGORIES:
            raise ValueError(
                f"Expected `counts` of at most {MAX_CATEGORIES} categories, got {count_array.size}"
            )
        if (count_array < 0).any():
            at = int(np.argmax(count_array < 0))
            raise ValueError(
                f"Expected `counts` to be non-negative, got {count_array[at]} at position {at}"
            )
        bounds = _check_thresholds(thresholds)
        ids = None
        if category_ids is not None:
            id_array = as_int_array(category_ids, "category_ids")
            if id_array.size != count_array.size:
                raise ValueError(
                    f"Expected as many `category_ids` as `counts`, got {id_array.size} ids for "
                    f"{count_array.size} counts"
                )
            order = np.argsort(id_array, kind="stable")
            count_array, ids = count_array[order], tuple(id_array[order].tolist())
        group_of = np.searchsorted(np.asarray(bounds, dtype=np.int64), count_array, side="right")
        edges = ["0", *(str(bound) for bound in bounds), "inf"]
        members = {
            f"{low}_{high}": tuple(np.flatnonzero(group_of == index).tolist())
            for index, (low, high) in enumerate(pairwise(edges))
            if (group_of == index).any()
        }
        return cls(tuple(members.values()), tuple(members), background, ids)

    @property
    def num_categories(self) -> int:
        """C, the number of foreground categories."""
        return sum(map(len, self.groups))

    @property
    def num_groups(self) -> int:
        """G, group 0 included where there is one."""
        return len(self.groups) + (self.background is not None)

    @property
    def num_logits(self) -> int:
        """L, the width of a row of logits."""
        return sum(self.group_sizes)

    @property
    def num_labels(self) -> int:
        """How many labels there are: C + 1 with background, C without."""
        return self.num_categories + (self.background is not None)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Columns of each group, `others` included: G integers."""
        head = () if self.background is None else (2,)
        return (*head, *(1 + len(group) for group in self.groups))

    @property
    def group_starts(self) -> tuple[int, ...]:
        """First logit column of each group: G integers."""
        starts = [0]
        for size in self.group_sizes[:-1]:
            starts.append(starts[-1] + size)
        return tuple(starts)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Name of each group: `bg_fg` for group 0, then the count ranges."""
        return self.names if self.background is None else (BACKGROUND_GROUP, *self.names)

    @property
    def background_label(self) -> int | None:
        """The label of background: 0, C, or None without background."""
        if self.background is None:
            return None
        return 0 if self.background == "first" else self.num_categories

    @property
    def foreground(self) -> slice:
        """The score columns (and labels) that are categories."""
        start = int(self.background == "first")
        return slice(start, start + self.num_categories)

    @property
    def bin_labels(self) -> Tensor:
        """The label of each group's softmax for each label: a fresh int64 tensor [G, num_labels].

        In group 0: 0 for background, 1 for a category. In another group: the category's
        position, counted from 1, or 0 (`others`) when the label is background or belongs to
        another group.
        """
        tables = self.tables("cpu")
        group_indices = torch.arange(self.num_groups, device="cpu")[:, None]
        table = torch.where(tables.label_groups == group_indices, tables.label_positions, 0)
        if self.background is not None:
            table[0] = tables.label_groups > 0
        return table

    def tables(self, device: torch.device | str | None = None) -> GroupTables:
        """The layout as small tensors on a device, for the operations.

        Cached: the first call for a device may wait for it, later ones never do. Before a
        function that uses the layout is compiled, call it once (a `BAGSHead` does so when it is
        made or moved), or the tables are made anew in every run of the compiled graph.
        """
        device = torch.device("cpu" if device is None else device)
        cache: dict[str, GroupTables] = self.__dict__["_tables_by_device"]
        tables = cache.get(str(device))
        if tables is None:
            tables = self._make_tables(device)
            traced = torch.compiler.is_compiling() or type(tables.label_groups) is not Tensor
            if not traced:  # else they would be tensors of the graph and not of this process
                cache[str(device)] = tables
        return tables

    def to_json(self) -> str:
        """The layout as JSON text, read back by `from_json`."""
        return layout_json.write(self.names, self.groups, self.background, self.category_ids)

    @classmethod
    def from_json(cls, text: str) -> GroupLayout:
        """Read what `to_json` wrote.

        Raises:
            TypeError: if `text` is not a string.
            ValueError: if it is not JSON, not a layout, of an unknown version, not consistent,
                or of absurd size.
        """
        fields = layout_json.read(text)
        try:
            layout = cls(fields.groups, fields.names, fields.background, fields.category_ids)
        except TypeError as error:  # to a reader of files a wrong type is a wrong value
            raise ValueError(f"The layout in the JSON is not valid: {error}") from None
        if fields.num_categories != layout.num_categories:
            raise ValueError(
                f"Expected 'num_categories' {layout.num_categories}, as many as the groups hold, "
                f"got {shown(fields.num_categories)}"
            )
        return layout

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout to a JSON file; a file already there is replaced in one step.

        Raises:
            OSError: if it cannot be written.
            ValueError: if `path` is a folder or a device.
        """
        with written_whole(Path(path)) as partial:
            partial.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GroupLayout:
        """Read a layout from a JSON file.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it does not hold a layout; the message names the file.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected a layout in a file, got a folder or device")
        size = path.stat().st_size
        if size > 4 * layout_json.MAX_CHARACTERS:
            raise ValueError(f"{path}: expected a layout, got a file of {size} bytes")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{path}: Expected a layout in JSON, got a file of no text") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], prefix: str = "") -> GroupLayout:
        """Read the layout that a `BAGSHead` left in a checkpoint.

        Args:
            state_dict: a model's state dict.
            prefix: the head's name in it, such as `"roi_heads.box_predictor.cls_score."`.
                Without one, heads are looked for everywhere; several are fine as long as
                their layouts are the same, as in a cascade.

        Raises:
            ValueError: if there is no layout, or there are different ones.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"Expected `state_dict` to be a mapping, got {type(state_dict).__name__}"
            )
        suffix = "_extra_state"
        if prefix:
            keys = [prefix + suffix, f"{prefix}.{suffix}"]
        else:
            keys = [key for key in state_dict if key == suffix or key.endswith("." + suffix)]
        found: dict[str, GroupLayout] = {}
        for key in keys:
            text = layout_json.text_of_extra_state(state_dict.get(key))
            if text is not None:
                found[key] = cls.from_json(text)
        if not found:
            where = f"under the prefix {prefix!r}" if prefix else "anywhere"
            raise ValueError(
                f"Expected a state dict with the layout of a BAGSHead, found none {where} among "
                f"{len(state_dict)} entries"
            )
        if len(set(found.values())) > 1:
            raise ValueError(
                f"Expected one layout, found different ones: give one of {sorted(found)} "
                f"(without '{suffix}') as `prefix`"
            )
        return next(iter(found.values()))

    def to_extra_state(self) -> Tensor:
        """The layout as a uint8 tensor of its JSON: what a checkpoint holds."""
        return torch.frombuffer(bytearray(self.to_json(), "utf-8"), dtype=torch.uint8)

    def differences(self, other: GroupLayout) -> list[str]:
        """What tells another layout from this one, in words; empty if they can share weights.

        Category ids are compared only where both layouts know them.
        """
        said = []
        if self.num_categories != other.num_categories:
            said.append(f"{other.num_categories} categories instead of {self.num_categories}")
        if self.names != other.names:
            said.append(f"groups {list(other.names)} instead of {list(self.names)}")
        if self.background != other.background:
            said.append(f"background {other.background!r} instead of {self.background!r}")
        if self.group_sizes != other.group_sizes:
            said.append(f"group sizes {other.group_sizes} instead of {self.group_sizes}")
        elif self.groups != other.groups:
            moved = sum(
                len(set(mine) - set(theirs))
                for mine, theirs in zip(self.groups, other.groups, strict=True)
            )
            said.append(f"{moved} categories in other groups")
        if self.category_ids is not None and other.category_ids is not None:
            pairs = list(zip(self.category_ids, other.category_ids, strict=False))
            differ = [index for index, (mine, theirs) in enumerate(pairs) if mine != theirs]
            if differ:
                mine, theirs = pairs[differ[0]]
                said.append(
                    f"other category ids at {len(differ)} positions, the first at {differ[0]}: "
                    f"{theirs} instead of {mine}"
                )
        return said

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name}: {len(group)}" for name, group in zip(self.names, self.groups, strict=True)
        )
        ids = "" if self.category_ids is None else ", category_ids known"
        return (
            f"GroupLayout({self.num_categories} categories {{{sizes}}}, "
            f"background={self.background!r}{ids})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Tables are caches of a device: neither pickled nor copied.
        return type(self), (self.groups, self.names, self.background, self.category_ids)

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupLayout:
        return self  # immutable

    def _make_tables(self, device: torch.device) -> GroupTables:
        # Whole groups at a time, so that a graph traced through this stays small.
        shape = (self.num_categories,)
        with torch.inference_mode(False):  # a cached inference tensor could not enter autograd
            groups = torch.zeros(shape, dtype=torch.int64, device=device)
            positions, columns = torch.zeros_like(groups), torch.zeros_like(groups)
            first = self.num_groups - len(self.groups)
            for index, group in enumerate(self.groups):
                members = torch.tensor(group, dtype=torch.int64, device=device)
                position = torch.arange(1, len(group) + 1, device=device)
                groups[members] = first + index
                positions[members] = position
                columns[members] = self.group_starts[first + index] + position
            edge = groups.new_zeros(1)
            front = [edge] if self.background == "first" else []
            back = [edge] if self.background == "last" else []
            return GroupTables(
                has_background=self.background is not None,
                foreground_start=self.foreground.start,
                starts=self.group_starts,
                sizes=self.group_sizes,
                label_groups=torch.cat([*front, groups, *back]),
                label_positions=torch.cat([*front, positions, *back]),
                label_columns=torch.cat([*front, columns, *back]).int(),
            )

    def _check_groups(self) -> None:
        if not self.groups:
            raise ValueError("Expected `groups` with at least one group, got none")
        total = sum(map(len, self.groups))
        if not 0 < total <= MAX_CATEGORIES:
            raise ValueError(f"Expected 1 to {MAX_CATEGORIES} categories in all, got {total}")
        if self.num_groups * (total + 1) > MAX_TABLE_ENTRIES:
            raise ValueError(
                f"Expected groups x labels of at most {MAX_TABLE_ENTRIES}, got {self.num_groups} "
                f"groups of {total} categories"
            )
        seen: set[int] = set()
        for index, group in enumerate(self.groups):
            if any(after <= before for before, after in pairwise(group)):
                raise ValueError(
                    f"Expected `groups[{index}]` to be ascending without repetition, got "
                    f"{shown(group)}"
                )
            for category in group:
                if category in seen or not 0 <= category < total:
                    raise ValueError(
                        f"Expected `groups` to hold each of 0..{total - 1} once, got {category} "
                        f"{'again ' if category in seen else ''}in groups[{index}]"
                    )
            seen.update(group)

    def _check_names(self) -> None:
        if len(self.names) != len(self.groups):
            raise ValueError(
                f"Expected one of `names` for each of {len(self.groups)} groups, got "
                f"{len(self.names)}"
            )
        for index, name in enumerate(self.names):
            if not isinstance(name, str):
                raise TypeError(f"Expected names[{index}] to be a str, got {type(name).__name__}")
            # A dot would make the name unfit for parameter and loss names.
            if not name or "." in name or len(name) > 255 or name == BACKGROUND_GROUP:
                raise ValueError(
                    f"Expected names[{index}] to be non-empty, without a dot and not "
                    f"{BACKGROUND_GROUP!r}, got {shown(name)}"
                )
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"Expected `names` without repetition, got {shown(self.names)}")

    def _check_category_ids(self) -> None:
        ids = self.category_ids
        if ids is None:
            return
        if len(ids) != self.num_categories:
            raise ValueError(
                f"Expected {self.num_categories} `category_ids`, one for each category, got "
                f"{len(ids)}"
            )
        for before, after in pairwise(ids):
            if after == before:
                raise ValueError(f"Expected `category_ids` without repetition, got {after} twice")
            if after < before:
                raise ValueError(
                    f"Expected ascending `category_ids`, got {after} after {before}; "
                    f"GroupLayout.from_counts sorts them together with their counts"
                )


def _check_background(background: object) -> None:
    if background is not None and not isinstance(background, str):
        raise TypeError(
            f"Expected `background` to be 'first', 'last' or None, got {type(background).__name__}"
        )
    if background not in ("first", "last", None):
        raise ValueError(
            f"Expected `background` to be 'first', 'last' or None, got {shown(background)}"
        )


def _check_thresholds(thresholds: Any) -> tuple[int, ...]:
    bounds = tuple(as_int_array(thresholds, "thresholds").tolist())
    for index, bound in enumerate(bounds):
        if bound <= 0:
            raise ValueError(
                f"Expected `thresholds` to be positive, got {bound} at position {index}"
            )
    for before, after in pairwise(bounds):
        if after <= before:
            raise ValueError(
                f"Expected `thresholds` to be strictly ascending, got {after} after {before}"
            )
    return bounds
