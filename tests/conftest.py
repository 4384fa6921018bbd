"""What every test shares: no network for model hubs, S3 and PostgreSQL servers, the demo base kept between runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.adapters import postgres as postgres_server
from tests.adapters import s3 as s3_server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads beside an engine cost 20 times the work

# The same examples on every run: a commit is green or it is not. New ones: pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

CACHE_DIR = Path(os.environ.get("LORAPLEX_CACHE_DIR", Path(__file__).parent.parent / ".cache"))


@pytest.fixture(scope="session")
def s3() -> Iterator[Callable[[], str]]:
    """Makes a fresh bucket on a real S3 server and returns its URL."""
    with s3_server.running() as fresh:
        yield fresh


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Makes a fresh database on a real PostgreSQL server and returns its URL."""
    with postgres_server.running() as fresh:
        yield fresh


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, the one `make demo` uses too."""
    from adapters.demo_base import NAME, prepare_demo_base

    return prepare_demo_base(CACHE_DIR / "demo-base" / NAME)
