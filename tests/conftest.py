"""What every test shares: no network for model hubs, no processes that outlive a run, S3 and PostgreSQL servers, the
demo base kept between runs, and a base of random weights that is small enough to train in a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import survivors
from tests.adapters import postgres as postgres_server
from tests.adapters import s3 as s3_server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads beside an engine cost 20 times the work

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a shell has it for what it starts in the background; a Ctrl-C that a test sends would reach nobody.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run: a commit is green or it is not. New ones: pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

CACHE_DIR = Path(os.environ.get("LORAPLEX_CACHE_DIR", Path(__file__).parent.parent / ".cache"))


@pytest.fixture(scope="session", autouse=True)
def _no_survivors() -> Iterator[None]:
    with survivors.none():
        yield


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


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database: whoever asks for it is tried on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/r.db"
    fresh: Callable[[], str] = request.getfixturevalue("postgres")
    return fresh()


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, the one `make demo` uses too."""
    from adapters.demo_base import NAME, prepare_demo_base

    return prepare_demo_base(CACHE_DIR / "demo-base" / NAME)


@pytest.fixture(scope="session")
def tokenizer(demo_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_base)


@pytest.fixture(scope="session")
def small_base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with the demo base's tokenizer and chat template. Every width is a multiple of the NF4 block."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bases") / "small"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
