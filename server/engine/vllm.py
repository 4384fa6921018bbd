"""The real engine: AsyncLLM, and vLLM's own OpenAI serving objects wired on a bare State.

vLLM parses, renders, schedules and formats; its adapter dictionary is replaced by the handles we were given, so it
never resolves a name, never loads inside a step and never lists an adapter. Knows no registry and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from server import problems, vllm_plugin
from server.engine import vllm_args, vllm_metrics
from server.engine.observe import Observation, ObservedEngine, current
from server.engine.protocol import AdapterHandle, Answer, EngineInfo, Generation
from server.errors import BadRequest, EngineUnavailable

# Fields with which a client would choose what only the server may choose.
RESERVED_FIELDS = (
    "ec_transfer_params",
    "kv_transfer_params",
    "priority",
    "request_id",
    "session_id",
    "vllm_xargs",
)


class VllmEngine:
    """One AsyncLLM. `argv` gives `vllm serve` arguments (see vllm_args.command_line); it may take a while."""

    def __init__(self, argv: Callable[[], Sequence[str]]) -> None:
        self._argv = argv
        self._engine: Any = None
        self._building: asyncio.Future[Any] | None = None
        self._serving: Any = None
        self._registry = CollectorRegistry()
        self._handles: dict[str, Any] = {}
        self._info: EngineInfo | None = None

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine has not been started"
        return self._info

    async def start(self) -> None:
        started = time.perf_counter()
        arguments = await asyncio.to_thread(lambda: vllm_args.parse(list(self._argv())))
        self._building = asyncio.ensure_future(asyncio.to_thread(self._build, arguments))
        self._engine = await asyncio.shield(self._building)
        self._serving = await self._wire(arguments)
        config = self._engine.vllm_config
        self._info = EngineInfo(
            model_name=self._serving.openai_serving_models.base_model_paths[0].name,
            max_model_len=config.model_config.max_model_len,
            start_s=time.perf_counter() - started,
        )

    def _build(self, arguments: Any) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        engine_arguments = AsyncEngineArgs.from_cli_args(arguments)
        if not vllm_plugin.is_active():
            raise EngineUnavailable("vLLM did not load our plugin: unset VLLM_PLUGINS, or name `loraplex` in it")
        return AsyncLLM.from_engine_args(engine_arguments, stat_loggers=[vllm_metrics.stat_logger(self._registry)])

    async def _wire(self, arguments: Any) -> Any:
        from starlette.datastructures import State
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state

        state = State()
        tasks = await self._engine.get_supported_tasks()
        await init_app_state(ObservedEngine(self._engine), state, arguments, tasks)
        models = state.openai_serving_models
        models.lora_requests = _Handles(self._handles)
        base_name = models.base_model_paths[0].name
        models.model_name = lambda _adapter=None: seen.echo_model if (seen := current.get()) else base_name
        return state

    async def stop(self) -> None:
        engine, building = self._engine, self._building
        self._engine = self._building = self._serving = None
        if engine is None and building is not None:  # cancelled while it was built: a thread cannot be
            with contextlib.suppress(Exception):
                engine = await building
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    async def check_health(self) -> None:
        with self._errors():
            await self._running().check_health()

    async def add_adapter(self, handle: AdapterHandle) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name=handle.name, lora_int_id=handle.int_id, lora_path=handle.path)
        engine = self._running()
        try:
            with self._errors():
                await engine.add_lora(request)
        except BaseException:
            # A load that failed half-way stays registered in the worker under its id.
            with contextlib.suppress(Exception):
                await engine.remove_lora(handle.int_id)
            raise
        self._handles[handle.name] = request

    async def remove_adapter(self, handle: AdapterHandle) -> None:
        self._handles.pop(handle.name, None)
        with self._errors():
            await self._running().remove_lora(handle.int_id)

    async def adapter_ids(self) -> set[int]:
        with self._errors():
            return set(await self._running().list_loras())

    @contextlib.asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[Answer]:
        seen = Observation(generation.echo_model)
        engine = self._running()
        token = current.set(seen)
        try:
            with self._errors():
                result = await self._submit(generation)
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # vLLM's serving classes make it an answer, "Client disconnected"
            yield _answer(result, seen)
        finally:
            with contextlib.suppress(ValueError):  # closed from another task's context
                current.reset(token)
            if seen.unfinished and not engine.errored:
                await engine.abort(list(seen.unfinished))

    async def _submit(self, generation: Generation) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        fields = {name: value for name, value in generation.body.items() if name not in RESERVED_FIELDS}
        fields["model"] = generation.adapter.name if generation.adapter else None
        fields["request_id"] = generation.request_id
        if generation.endpoint == "chat":
            return await self._serving.openai_serving_chat.create_chat_completion(
                _validated(ChatCompletionRequest, fields)
            )
        return await self._serving.openai_serving_completion.create_completion(_validated(CompletionRequest, fields))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        tokenizer = self._running().get_tokenizer()
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def metrics(self) -> Iterable[Metric]:
        return self._registry.collect()

    def _running(self) -> Any:
        if self._engine is None:
            raise EngineUnavailable("the engine is not running; try again shortly")
        return self._engine

    @contextlib.contextmanager
    def _errors(self) -> Any:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            raise EngineUnavailable("the engine died; it is being rebuilt, try again shortly") from None
        except GracefulHTTPError as error:
            raise EngineUnavailable(error.message) from None
        except VLLMClientError as error:
            raise BadRequest(str(error), param=getattr(error, "parameter", None)) from None


class _Handles:
    """What vLLM's serving classes see in place of their adapter dictionary: the loaded adapters, listed to no one."""

    def __init__(self, handles: dict[str, Any]) -> None:
        self._handles = handles

    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def __getitem__(self, name: str) -> Any:
        return self._handles[name]

    def values(self) -> Sequence[Any]:
        return ()


def _validated(request_type: Any, fields: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return request_type.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = str(first["loc"][0]) if first["loc"] else None
        raise BadRequest(f"{where}: {first['msg']}" if where else first["msg"], param=where) from None
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _answer(result: Any, seen: Observation) -> Answer:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(result, ErrorResponse):
        found = result.error
        return Answer(seen.stats, found.code, problems.body(found.code, found.message, param=found.param))
    if hasattr(result, "model_dump"):
        return Answer(seen.stats, 200, result.model_dump())
    return Answer(seen.stats, events=_with_our_errors(result))


async def _with_our_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """vLLM's events, its error events in our body. The closing [DONE] is vLLM's own."""
    async for event in events:
        yield _error_event(event) if event.startswith('data: {"error"') else event


def _error_event(event: str) -> str:
    found = json.loads(event.removeprefix("data: "))["error"]
    return problems.event(found["code"], found["message"], param=found.get("param"))
