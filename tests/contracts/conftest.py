"""Without the caller's settings, for the servers that whole modules share as well."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in [name for name in os.environ if name.startswith("LORAPLEX_") and name != "LORAPLEX_CACHE_DIR"]:
            monkeypatch.delenv(name)
        yield
