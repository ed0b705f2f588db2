"""Tiny pipelines of the real classes, and two prompts."""

import pytest

from ..models.conftest import folders  # noqa: F401


@pytest.fixture(scope="session")
def folder(world):
    (world / "prompts.txt").write_text("a cat on a mat\ntwo red apples\n")
    return world
