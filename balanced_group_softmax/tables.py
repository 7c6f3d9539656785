"""What the operations know of a layout: a few plain integers and small index tensors."""

from typing import NamedTuple

from torch import Tensor


class GroupTables(NamedTuple):
    """A layout as integers and tensors on one device; made by `GroupLayout.tables`.

    Group indices count group 0 (background against foreground) where there is one. A position
    is a column counted from the start of its group, so position 0 is `others`, and in group 0
    it is the background.
    """

    num_groups: int  # G, group 0 included where there is one
    has_background: bool  # whether group 0 tells background from foreground
    first_category_group: int  # index of the first group of categories: 1 with group 0, else 0
    foreground_start: int  # first score column that is a category
    starts: tuple[int, ...]  # [G] first logit column of each group
    sizes: tuple[int, ...]  # [G] columns of each group, `others` included
    label_groups: Tensor  # int64 [num_labels]: the group a label belongs to; 0 for background
    label_positions: Tensor  # int64 [num_labels]: the label's position in that group
    category_columns: Tensor  # int64 [C]: logit column of each category
    category_groups: Tensor  # int64 [C]: group of each category
