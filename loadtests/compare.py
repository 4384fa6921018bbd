"""FLOW compare: start each server in turn → warm up → replay the same traces → figures → ratios.

`measure` is the story of one server. Results are plain records that go to JSON and to the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.progress import Progress

from loadtests.figures import Figures, Interval, Slo, ratio
from loadtests.generator import LoadGenerator, Outcome
from loadtests.scenarios import PROMPT, SUITES, Dials, Measure, Relation, Scenario
from loadtests.servers import Setup, running
from loadtests.trace import Lengths, Workload, make_trace

console = Console(stderr=True)

FIRST_USE = PROMPT, Lengths(4, 4)
MEASURES = {
    "decode tokens/s": lambda figures: figures.decode_tokens_per_s,
    "tokens/s": lambda figures: figures.output_tokens_per_s,
    "TTFT p50": lambda figures: figures.ttft_s.p50,
    "TTFT p99": lambda figures: figures.ttft_s.p99,
}


@dataclass
class ServerResult:
    """One server: its outcomes by scenario, one list a repetition."""

    name: str
    ready_s: float
    memory_mb: float = 0.0
    first_use_ttft_s: tuple[float, ...] = ()
    """Of the first request to each adapter that nobody had asked for."""
    second_use_ttft_s: tuple[float, ...] = ()
    outcomes: dict[str, list[list[Outcome]]] = field(default_factory=dict)

    def values(self, scenario: Scenario, slo: Slo) -> list[float]:
        """The figure that `scenario` compares, of each repetition."""
        return [
            MEASURES[scenario.measure](self._figures(scenario, each, slo)) for each in self.outcomes[scenario.source]
        ]

    def _figures(self, scenario: Scenario, outcomes: Sequence[Outcome], slo: Slo) -> Figures:
        return Figures.of([one for one in outcomes if scenario.of in (None, one.model)], slo)


@dataclass
class Plan:
    """What is asked of every server. `rate` None: the first server's speed decides it for all of them."""

    suite: str
    dials: Dials
    repetitions: int
    unused: Sequence[str]
    """Adapters whose first use is timed before anything else."""
    rate: float | None = None
    only: Sequence[str] = ()
    """Names of the scenarios that are wanted; all of the suite when empty."""

    @property
    def scenarios(self) -> list[Scenario]:
        assert self.rate is not None
        found = SUITES[self.suite](replace(self.dials, rate=self.rate))
        return [each for each in found if not self.only or each.name in self.only or each.seen_in in self.only]

    def calibrate(self, outcomes: Sequence[Outcome]) -> None:
        """Open loops at 60 % of what eight clients at once got."""
        if self.rate is None:
            tokens_per_s = Figures.of(outcomes, Slo(0, 0)).output_tokens_per_s
            self.rate = round(0.6 * tokens_per_s / self.dials.tokens, 3)
            console.print(f"open loops send {self.rate:g} requests/s")


def measure(name: str, setup: Setup, plan: Plan, generator: LoadGenerator) -> ServerResult:
    """Everything of one server."""
    console.rule(f"[bold]{name}")
    with running(name, setup) as server:
        console.print(f"ready after {server.ready_s:.1f} s")
        result = ServerResult(name, server.ready_s)
        generator.replay(make_trace(Workload((setup.base.name,), 2, *FIRST_USE, concurrency=1), 0), server.url)
        if plan.unused:
            each_once = Workload(tuple(plan.unused), len(plan.unused), *FIRST_USE, concurrency=1)
            uses = [generator.replay(make_trace(each_once, seed), server.url) for seed in (0, 1)]
            result.first_use_ttft_s, result.second_use_ttft_s = (tuple(one.ttft_s for one in use) for use in uses)
        answers = Lengths(plan.dials.tokens, plan.dials.tokens)
        one = plan.dials.adapters[0] if plan.dials.adapters else plan.dials.base
        at_once = Workload((one,), 8, PROMPT, answers, concurrency=8)
        plan.calibrate(generator.replay(make_trace(at_once, 0), server.url))
        scenarios = [scenario for scenario in plan.scenarios if scenario.workloads]
        with Progress(console=console) as progress:
            task = progress.add_task(name, total=len(scenarios) * (1 + plan.repetitions))
            for scenario in scenarios:
                progress.update(task, description=f"{name}: {scenario.title}")
                replays = []
                for seed in range(1 + plan.repetitions):
                    trace = scenario.trace(seed)
                    if seed or trace.concurrency:  # seed 0 warms up; what arrives over minutes does without
                        replays.append(generator.replay(trace, server.url))
                    progress.advance(task)
                result.outcomes[scenario.name] = replays[-plan.repetitions :]
        result.memory_mb = server.memory_mb
        return result


@dataclass(frozen=True)
class Row:
    """One scenario: the compared figure of every server, and its ratio to the first server's."""

    title: str
    measure: Measure
    figures: Mapping[str, Interval]
    ratios: Mapping[str, Interval]


def rows(results: Sequence[ServerResult], scenarios: Sequence[Scenario], slo: Slo) -> list[Row]:
    """One row a scenario; the first of `results` is what the others are compared with."""
    found = []
    for scenario in scenarios:
        values = {result.name: result.values(scenario, slo) for result in results}
        reference = values[results[0].name]
        ratios = {name: ratio(mine, reference) for name, mine in values.items() if name != results[0].name}
        figures = {name: Interval.of(mine) for name, mine in values.items()}
        found.append(Row(scenario.title, scenario.measure, figures, ratios))
    return found


def related(
    result: ServerResult, scenarios: Sequence[Scenario], relations: Sequence[Relation], slo: Slo
) -> dict[str, Interval]:
    """Title of each relation that the suite has → its ratio within this server."""
    by_name = {scenario.name: scenario for scenario in scenarios}
    found = {
        relation.title: ratio(
            result.values(by_name[relation.scenario], slo), result.values(by_name[relation.reference], slo)
        )
        for relation in relations
        if relation.scenario in by_name and relation.reference in by_name
    }
    if result.first_use_ttft_s:
        found["first use of an adapter / second, TTFT"] = ratio(result.first_use_ttft_s, result.second_use_ttft_s)
    return found
