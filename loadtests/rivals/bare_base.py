"""What a merged engine must be as fast as: the base alone, unquantised and with LoRA off, behind our own front-end.

    python -m loadtests.rivals.bare_base --port N --model DIRECTORY --data-dir DIRECTORY --quantization none

The flags are those of `loraplex serve`. The engine is built with the arguments that a merged engine has, of the base's
own weights; so two servers differ in nothing but the weights.
"""

from __future__ import annotations

import sys

import uvicorn

from server import logs
from server.app import create_app
from server.base import find_base
from server.engine import vllm_args
from server.engine.vllm import VllmEngine
from server.settings_sources import load_settings


def main(argv: list[str]) -> None:
    settings = load_settings(argv)
    vllm_args.prepare_environment(settings)
    base = find_base(settings)
    logs.configure(settings.log_level)
    arguments = vllm_args.merged_command_line(settings, base.path, base.name, None)
    app = create_app(settings, build_engine=lambda: VllmEngine(lambda: arguments))
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
