"""Tiny pipelines of the real classes by kind, and a folder for embeddings."""

import pytest


@pytest.fixture(scope="session")
def folders(world):
    return {"sd3": world / "sd3", "flux": world / "flux", "cache": world / "cache"}
