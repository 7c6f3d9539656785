"""What the operations know of a layout: a few plain integers and small index tensors."""

from typing import NamedTuple

from torch import Tensor


class GroupTables(NamedTuple):
    """A layout as integers and tensors on one device; made by `GroupLayout.tables`.

    Group indices count group 0 (background against foreground) where there is one. A position
    is a column counted from the start of its group, so position 0 is `others`, and in group 0
    it is the background.
    """

    has_background: bool  # whether group 0 tells background from foreground
    foreground_start: int  # first score column that is a category
    starts: tuple[int, ...]  # [G] first logit column of each group
    sizes: tuple[int, ...]  # [G] columns of each group, `others` included
    label_groups: Tensor  # int64 [num_labels]: the group a label belongs to; 0 for background
    label_positions: Tensor  # int64 [num_labels]: the label's position in that group
    label_columns: Tensor  # int32 [num_labels]: the label's logit column; 0 for background

    @property
    def num_groups(self) -> int:
        """G, group 0 included where there is one."""
        return len(self.starts)

    @property
    def first_category_group(self) -> int:
        """Index of the first group of categories: 1 with group 0, else 0."""
        return int(self.has_background)

    @property
    def num_labels(self) -> int:
        """Labels, background included where there is one."""
        return self.label_groups.shape[0]

    @property
    def num_categories(self) -> int:
        """C."""
        return self.num_labels - int(self.has_background)

    @property
    def categories(self) -> slice:
        """Which labels are categories."""
        return slice(self.foreground_start, self.foreground_start + self.num_categories)

    @property
    def category_columns(self) -> Tensor:
        """Logit column of each category, int32 [C]."""
        return self.label_columns[self.categories]

    @property
    def category_groups(self) -> Tensor:
        """Group of each category, int64 [C]."""
        return self.label_groups[self.categories]
