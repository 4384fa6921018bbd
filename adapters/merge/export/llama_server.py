"""llama.cpp's own server around one GGUF file, in a process of its own: what it cannot read may end that process.

    python -m adapters.merge.export.llama_server MODEL.gguf [--lora FILE] [--context N] [--threads N]

It prints its address, which is on loopback, and ends when its standard input does. Needs the package xllamacpp.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--lora")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = arguments.model
    settings.n_ctx = arguments.context
    settings.n_parallel = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = arguments.threads
    settings.warmup = False
    if arguments.lora:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(arguments.lora, 1.0)]
    server = xllamacpp.Server(settings)
    sys.stdout.write(server.listening_address + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # nothing to save, and the library's threads take their time


if __name__ == "__main__":
    main()
