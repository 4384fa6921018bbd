"""The names of vLLM that are not its public interface and that `server/engine` leans on: there, and as they were read.

A new pin that moves one of them fails here, by name, before it fails in front of a client. What the plugin replaces is
checked in tests/server/vllm_plugin/test_patches.py.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from server.engine.vllm import RESERVED_FIELDS

pytestmark = pytest.mark.engine  # starts none, but importing vLLM takes as long
pytest.importorskip("vllm")


@pytest.fixture(autouse=True)
def _vllm_warns_when_imported() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def named(name: str) -> Any:
    """`module:attribute.attribute`"""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def parameters(name: str) -> list[str]:
    return [each for each in inspect.signature(named(name)).parameters if each != "self"]


ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"
CALLED = {
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": [
        "engine_client",
        "state",
        "args",
        "supported_tasks",
    ],
    f"{ENGINE}.from_engine_args": ["engine_args", "start_engine_loop", "usage_context", "stat_loggers"],
    f"{ENGINE}.add_lora": ["lora_request"],
    f"{ENGINE}.remove_lora": ["lora_id"],
    f"{ENGINE}.list_loras": [],
    f"{ENGINE}.check_health": [],
    f"{ENGINE}.get_tokenizer": [],
    f"{ENGINE}.abort": ["request_id", "internal"],
    f"{ENGINE}.shutdown": ["timeout"],
    f"{ENGINE}.get_supported_tasks": [],
    "vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args": ["args"],
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": ["parser"],
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": ["args"],
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name": ["lora_request"],
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion": [
        "request",
        "raw_request",
    ],
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.create_completion": ["request", "raw_request"],
    "vllm.v1.metrics.loggers:PrometheusStatLogger": ["vllm_config", "engine_indexes"],
}


@pytest.mark.parametrize(("name", "expected"), CALLED.items(), ids=list(CALLED))
def test_called_with_the_parameters_that_were_read(name: str, expected: list[str]) -> None:
    assert parameters(name) == expected


def test_generate_begins_with_what_we_pass_on() -> None:
    assert parameters(f"{ENGINE}.generate")[:3] == ["prompt", "sampling_params", "request_id"]
    assert inspect.isasyncgenfunction(named(f"{ENGINE}.generate"))


def test_a_dead_engine_is_a_property() -> None:
    assert isinstance(inspect.getattr_static(named(ENGINE), "errored"), property)


def test_an_adapter_is_named_by_name_id_and_path() -> None:
    request = named("vllm.lora.request:LoRARequest")(lora_name="a@1", lora_int_id=1, lora_path="/a")
    assert (request.lora_name, request.lora_int_id, request.lora_path, request.load_inplace) == ("a@1", 1, "/a", False)


def test_the_adapter_dictionary_is_an_attribute_used_in_the_three_ways_that_ours_answers() -> None:
    """`in`, `[]` and `.values()` on the path of a request; the rest is in routes that are not mounted."""
    models = named("vllm.entrypoints.openai.models.serving:OpenAIServingModels")
    assert "self.lora_requests: dict[str, LoRARequest] = {}" in inspect.getsource(models.__init__)
    assert "base_model_paths" in inspect.getsource(models.__init__)
    serving = inspect.getsource(importlib.import_module("vllm.entrypoints.serve.engine.serving"))
    uses = [line.strip() for line in serving.splitlines() if "lora_requests" in line]
    assert len(uses) == 4
    known = (
        "in self.models.lora_requests:",
        "self.models.lora_requests.values():",
        "self.models.lora_requests[request.model]",
    )
    assert [line for line in uses if not line.endswith(known)] == []


def test_the_metric_classes_are_attributes_of_the_logger() -> None:
    from prometheus_client import Counter, Gauge, Histogram

    logger = named("vllm.v1.metrics.loggers:PrometheusStatLogger")
    assert (logger._gauge_cls, logger._counter_cls, logger._histogram_cls) == (Gauge, Counter, Histogram)
    assert "self.gauge_lora_info" in inspect.getsource(logger.__init__)


def test_an_output_tells_what_is_observed() -> None:
    stats = named("vllm.v1.metrics.stats:RequestStateStats")()
    assert (stats.is_corrupted, stats.first_token_latency) == (False, 0.0)
    outputs = {"prompt_token_ids", "outputs", "finished", "metrics"}
    assert outputs <= set(parameters("vllm.outputs:RequestOutput"))
    assert "token_ids" in parameters("vllm.outputs:CompletionOutput")


@pytest.mark.parametrize(
    "kind", ["chat_completion.protocol:ChatCompletionRequest", "completion.protocol:CompletionRequest"]
)
def test_a_request_has_the_fields_that_we_set_and_take_out(kind: str) -> None:
    fields = named(f"vllm.entrypoints.openai.{kind}").model_fields
    assert {"model", "request_id", *RESERVED_FIELDS} <= set(fields)
    assert not fields["model"].is_required()


def test_a_failure_is_a_body_with_the_fields_that_we_copy() -> None:
    protocol = "vllm.entrypoints.serve.engine.protocol"
    assert "error" in named(f"{protocol}:ErrorResponse").model_fields
    assert {"message", "param", "code"} <= set(named(f"{protocol}:ErrorInfo").model_fields)


def test_the_exceptions_that_we_translate() -> None:
    assert named("vllm.exceptions:GracefulHTTPError")("gone", 503).message == "gone"
    for name in ("vllm.exceptions:VLLMClientError", "vllm.v1.engine.exceptions:EngineDeadError"):
        assert issubclass(named(name), Exception)


def test_our_arguments_are_vllms(tmp_path: Any) -> None:
    """Every flag of `command_line` parses; an unknown one ends the process."""
    from server.engine import vllm_args
    from server.settings import Settings

    for settings in (
        Settings(),
        Settings(compile=True),
        Settings(device="cuda"),
        Settings(device="cuda", compile=False),
    ):
        parsed = vllm_args.parse(vllm_args.command_line(settings, tmp_path, "base", ["q_proj"]))
        assert (parsed.enable_lora, parsed.max_cpu_loras, parsed.lora_target_modules) == (True, 65, ["q_proj"])
        (tmp_path / "config.json").write_text("{}")
        parsed = vllm_args.parse(vllm_args.merged_command_line(settings, tmp_path, "a@0123456789ab", None))
        assert (bool(parsed.enable_lora), parsed.served_model_name) == (False, ["a@0123456789ab"])
