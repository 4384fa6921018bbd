"""`loraplex`: one command, a word for each job. Heavy imports wait until the word is known."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters.errors import AdapterError
from server.errors import SettingsError

USAGE = """usage: loraplex <command> [options]

  serve    serve the base model and its adapters          loraplex serve --help
  train    make an adapter                                 loraplex train --help
  merge    an adapter and its base into one model          loraplex merge --help
  fidelity what such a merge would keep of the adapter     loraplex fidelity --help
  export   such a model as other programs load it: GGUF, … loraplex export --help
  adapters push, list, pull, promote, roll back, gc, …     loraplex adapters --help
  jobs     what a server fetches in the background         loraplex jobs --help
  keys     make an API key                                 loraplex keys new --help
  demo     train two adapters, serve them, chat with them  loraplex demo --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 wrongly called or configured (train, merge, fidelity, export: see --help)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": serve,
        "train": train,
        "merge": merge,
        "fidelity": fidelity,
        "export": export,
        "adapters": adapters,
        "jobs": jobs,
        "keys": keys,
        "demo": demo,
    }
    if not arguments or arguments[0] not in commands:
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked_for_help else sys.stderr, end="")
        return 0 if asked_for_help else 2
    try:
        return commands[arguments[0]](arguments[1:])
    except (SettingsError, AdapterError) as error:
        print(f"loraplex {arguments[0]}: {error}", file=sys.stderr)
        return 2


def serve(argv: list[str]) -> int:
    """Run the server until SIGINT or SIGTERM. Exit code 1 when the engine's first start fails."""
    from server.listen import require_free
    from server.settings_sources import load_settings

    settings = load_settings(argv)
    require_free(settings.host, settings.port)

    import uvicorn

    from server import logs
    from server.app import create_app

    logs.configure(settings.log_level)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
    )
    server = uvicorn.Server(config)
    failed = threading.Event()

    def give_up() -> None:
        failed.set()
        server.should_exit = True

    app.state.services.pool.on_first_failure = give_up
    # Once it has shut down, uvicorn raises the signal again: by then there is nothing left to interrupt.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 1 if failed.is_set() else 0


def train(argv: list[str]) -> int:
    from adapters.train.cli import main as train_main

    return train_main(argv)


def merge(argv: list[str]) -> int:
    from server.adapters_cli import merging

    if merging.is_meant(argv):
        return merging.merge_main(argv)
    from adapters.merge.cli import main as merge_main

    return merge_main(argv)


def fidelity(argv: list[str]) -> int:
    from adapters.merge.fidelity_cli import main as fidelity_main

    return fidelity_main(argv)


def export(argv: list[str]) -> int:
    from server.adapters_cli import merging

    if merging.is_meant(argv):
        return merging.export_main(argv)
    from adapters.merge.export.cli import main as export_main

    return export_main(argv)


def adapters(argv: list[str]) -> int:
    from server.adapters_cli.command import main as adapters_main

    return adapters_main(argv)


def jobs(argv: list[str]) -> int:
    from server.adapters_cli.jobs import main as jobs_main

    return jobs_main(argv)


def keys(argv: list[str]) -> int:
    """Print a new key once and append its hash to the key file."""
    from server.keys import SCOPES, create_key

    parser = argparse.ArgumentParser(prog="loraplex keys")
    new = parser.add_subparsers(required=True, metavar="new").add_parser("new", help="make a key")
    new.add_argument("--key-file", type=Path, required=True, help="file of hashed keys, made if missing")
    new.add_argument("--id", required=True, help="a name for the key, shown in logs")
    new.add_argument("--scopes", default="infer", help=f"comma separated, of {', '.join(sorted(SCOPES))}")
    chosen = parser.parse_args(argv)
    secret = create_key(chosen.key_file, chosen.id, chosen.scopes.split(","))
    print(secret)
    print(f"Keep it: only its hash is in {chosen.key_file}.", file=sys.stderr)
    return 0


def demo(argv: list[str]) -> int:
    from server.demo import main as demo_main

    return demo_main(argv)


if __name__ == "__main__":
    sys.exit(main())
