"""Fixtures of the tests of the runtime."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.runtime import plugins


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Forget the files that a test loads."""
    before = plugins.loaded_files()
    yield
    for path in set(plugins.loaded_files()) - set(before):
        plugins.forget_file(path)
