"""The patched vLLM in the test's own process, for tests that need no engine."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(scope="session")
def patched_vllm() -> None:
    pytest.importorskip("vllm")
    from server import vllm_plugin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports
        if not vllm_plugin.needed():
            pytest.skip("the fixes are for vLLM's CPU platform")
        vllm_plugin.register()
