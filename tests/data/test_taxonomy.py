"""Distances in a tree of classes."""

import pytest

from nabla_jax.data.taxonomy import distance

JUNCO = ("Birds", "Perching Birds", "Sparrows", "Dark-eyed Junco", "Dark-eyed Junco (Oregon)")


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([JUNCO], 0),
        ([(*JUNCO[:4], "Dark-eyed Junco (White-winged)")], 1),
        ([("Birds", "Perching Birds", "Sparrows", "Song Sparrow")], 2),
        ([("Birds", "Perching Birds", "Finches", "House Finch")], 3),
        ([("Birds", "Owls", "Barn Owl")], 4),
        ([("Fish", "Perch")], 5),
        ([], 5),
        ([("Birds", "Owls", "Barn Owl"), ("Birds", "Perching Birds", "Finches", "House Finch")], 3),
        ([("Birds", "Owls", "Sparrows", "Dark-eyed Junco")], 4),  # a name elsewhere in the tree is another group
    ],
)
def test_distance_counts_levels_to_the_lowest_shared_group(others, expected):
    assert distance(JUNCO, others) == expected


def test_distance_of_no_path():
    with pytest.raises(ValueError, match="empty path"):
        distance((), [JUNCO])
