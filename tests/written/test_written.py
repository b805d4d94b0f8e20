"""The catalogue is used whole: every tag by an entry and by a test, and every entry by a test."""

from pathlib import Path

import pytest
from fuzz import world

from written import TAGS, tagged
from written.fields import FIELDS, POTENTIALS
from written.networks import NETWORKS
from written.pieces import IMAGES, PIECES, VECTORS
from written.scalars import SCALARS

TESTS = {
    path: path.read_text() for path in Path(__file__).parents[1].rglob("*.py") if path.parent != Path(__file__).parent
}


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_is_some_entry_s_and_some_test_s(tag):
    assert tagged(FIELDS, tag)
    assert any(f'"{tag}"' in text for text in TESTS.values())


def test_every_tag_is_explained():
    assert frozenset().union(*(entry.tags for entry in FIELDS.values())) == set(TAGS)


def test_no_name_is_another_s():
    assert len(PIECES) == len(VECTORS) + len(IMAGES)
    assert len(FIELDS) == len(POTENTIALS) == len(PIECES) + len(NETWORKS) + len(SCALARS)


def test_every_entry_is_used():
    """Networks and scalar functions as fields and as potentials, pieces by generated calls."""
    for table in ("FIELDS", "POTENTIALS"):
        assert any(f"import DEFAULT, {table}\n" in text for text in TESTS.values())
    assert (world.VECTORS, world.IMAGES) == (VECTORS, IMAGES)
