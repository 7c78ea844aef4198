"""Fixtures that tests of studies share."""

import pathlib

import pytest

from tests.studying.studies import make_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> pathlib.Path:
    """A tiny model and its documents."""
    return make_parts(tmp_path_factory.mktemp("study"))
