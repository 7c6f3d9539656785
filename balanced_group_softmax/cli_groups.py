"""What the command `groups` says of a data set's groups."""

from collections.abc import Sequence
from itertools import pairwise

from balanced_group_softmax.cli_program import aligned, count_range, one_line
from balanced_group_softmax.counts import CountedCategory
from balanced_group_softmax.layout import BACKGROUND_GROUP, GroupLayout

__all__ = ["describe", "empty_groups", "title"]

_SHOWN = 5  # names in a list of categories


def describe(layout: GroupLayout, categories: Sequence[CountedCategory]) -> list[str]:
    """Return the table of the groups, and which categories were never seen.

    Args:
        layout: made from the counts of `categories`.
        categories: in ascending order of id.
    """
    total = sum(category.instances for category in categories)
    heading = "group", "instances of a category", "categories", "columns", "instances", "share"
    rows: list[tuple[str, ...]] = [(*heading, "fewest", "most")]
    if layout.background is not None:
        rows.append((BACKGROUND_GROUP, "", "", "2", "", "", "", ""))
    for name, group in zip(layout.names, layout.groups, strict=True):
        counts = [categories[index].instances for index in group]
        fewest, most = (group[counts.index(edge(counts))] for edge in (min, max))
        rows.append(
            (
                name,
                count_range(name),
                str(len(group)),
                str(1 + len(group)),
                str(sum(counts)),
                f"{100 * sum(counts) / total:.2f}%" if total else "-",
                *(
                    f"{title(categories[index], index)}: {categories[index].instances}"
                    for index in (fewest, most)
                ),
            )
        )
    rows.append(("all", "", str(len(categories)), str(layout.num_logits), str(total), "", "", ""))
    lines = aligned(rows, left=(0, 1, 6, 7))
    unseen = [index for index, category in enumerate(categories) if category.instances == 0]
    if unseen:
        names = [title(categories[index], index) for index in unseen[:_SHOWN]]
        rest = len(unseen) - len(names)
        names += [f"{rest} more"] if rest else []
        in_group = next(
            name
            for name, group in zip(layout.names, layout.groups, strict=True)
            if unseen[0] in group
        )
        lines.append(
            f"never seen in training: {len(unseen)} of {len(categories)} categories, all in group "
            f"{in_group}: {', '.join(names)}"
        )
    return lines


def empty_groups(layout: GroupLayout, thresholds: Sequence[int]) -> list[str]:
    """Return the names of the groups that the thresholds make and no category is in."""
    edges = ["0", *map(str, thresholds), "inf"]
    return [f"{low}_{high}" for low, high in pairwise(edges) if f"{low}_{high}" not in layout.names]


def title(category: CountedCategory, index: int) -> str:
    """Return what a category is called: its name, or else its id, or else its place."""
    if category.name:
        return one_line(category.name)
    return f"id {category.id}" if category.id is not None else f"position {index}"
