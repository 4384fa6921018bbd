"""The page people look at: one self-contained HTML file with tables and plots; the plain figures beside it as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.compare import Row, ServerResult
from loadtests.figures import Figures, Interval, Slo, by_model
from loadtests.scenarios import Scenario

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; text-align: right }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } small, .of { color: #777 }
.better { color: #06662a; font-weight: 600 } .worse { color: #a3140c }
"""


def write_report(
    directory: Path,
    results: Sequence[ServerResult],
    scenarios: Sequence[Scenario],
    rows: Sequence[Row],
    relations: dict[str, dict[str, Interval]],
    facts: dict[str, str],
    slo: Slo,
) -> Path:
    """`directory`/index.html and results.json. Returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(_plain(results, rows, relations, facts), indent=1))
    parts = [
        f"<!doctype html><meta charset=utf-8><title>loraplex load test</title><style>{STYLE}</style>",
        "<h1>Load test</h1>",
        _facts(facts),
        "<h2>The same traces, one server after the other</h2>",
        _comparison(rows, [result.name for result in results]),
        _image(_bars(rows, results)),
        _relations(relations),
    ]
    for scenario in (each for each in scenarios if each.workloads):
        parts += [f"<h2>{html.escape(scenario.title)}</h2>", _scenario(scenario, results, slo)]
        parts.append(_image(_timeline(scenario, results)))
    page = directory / "index.html"
    page.write_text("\n".join(parts))
    return page


def interval(value: Interval, digits: int = 1, *, bounds: bool = True) -> str:
    """`12.3 (11.9 to 12.7)`; the bounds are left out where nothing is known of them."""
    mean = f"{value.mean:.{digits}f}"
    known = bounds and value.high > value.low
    return f"{mean} ({max(0.0, value.low):.{digits}f} to {value.high:.{digits}f})" if known else mean


def compared(value: Interval, measure: str, *, bounds: bool = True) -> str:
    """A compared figure in the unit that its scale asks for."""
    if not measure.startswith("TTFT"):
        return interval(value, bounds=bounds)
    return interval(Interval(1e3 * value.mean, 1e3 * value.low, 1e3 * value.high), 0, bounds=bounds) + " ms"


def _plain(
    results: Sequence[ServerResult], rows: Sequence[Row], relations: dict[str, Any], facts: dict[str, str]
) -> dict[str, Any]:
    return {
        "facts": facts,
        "rows": [asdict(row) for row in rows],
        "relations": {
            name: {title: asdict(each) for title, each in found.items()} for name, found in relations.items()
        },
        "servers": [asdict(result) for result in results],
    }


def _facts(facts: dict[str, str]) -> str:
    return _table([], [[html.escape(name), html.escape(value)] for name, value in facts.items()])


def _comparison(rows: Sequence[Row], names: Sequence[str]) -> str:
    reference, *others = names
    body = []
    for row in rows:
        cells = [f"{html.escape(row.title)} <span class=of>{row.measure}</span>"]
        cells += [compared(row.figures[name], row.measure) for name in names]
        cells += [_ratio(row.ratios[name], row.measure) for name in others]
        body.append(cells)
    return _table(["", *names, *(f"{name} / {reference}" for name in others)], body)


def _ratio(value: Interval, measure: str) -> str:
    better = value.mean < 1 if measure.startswith("TTFT") else value.mean > 1
    sure = value.high < 1 or value.low > 1
    return f"<span class={('better' if better else 'worse') if sure else 'same'}>{interval(value, 2)}</span>"


def _relations(relations: dict[str, dict[str, Interval]]) -> str:
    titles = sorted({title for found in relations.values() for title in found})
    if not titles:
        return ""
    body = [
        [html.escape(title), *(interval(found[title], 2) if title in found else "" for found in relations.values())]
        for title in titles
    ]
    return "<h2>Within one server</h2>" + _table(["", *relations], body)


def _scenario(scenario: Scenario, results: Sequence[ServerResult], slo: Slo) -> str:
    """All repetitions of each server together, then its busiest models alone."""
    heading = ["", "requests", "tokens/s", "decode tokens/s", "goodput/s"]
    heading += [f"{name} {share}" for name in ("TTFT", "ITL", "end") for share in ("p50", "p95", "p99")]
    body = []
    for result in results:
        replays = result.outcomes[scenario.name]
        rates = [Figures.of(replay, slo) for replay in replays]
        together = [outcome for replay in replays for outcome in replay]
        body.append(_line(f"<b>{result.name}</b>", rates, Figures.of(together, slo)))
        models = by_model(together)
        if len(models) > 1:
            for model, outcomes in list(models.items())[:4]:
                body.append(_line(html.escape(model), [], Figures.of(outcomes, slo)))
    return _table(heading, body) + "<small>Latencies in ms. Rates are means over the repetitions.</small>"


def _line(title: str, rates: Sequence[Figures], figures: Figures) -> list[str]:
    measured = ("output_tokens_per_s", "decode_tokens_per_s", "goodput_per_s")
    cells = [f"{np.mean([getattr(each, name) for each in rates]):.2f}" if rates else "" for name in measured]
    for percentiles in (figures.ttft_s, figures.itl_s, figures.latency_s):
        cells += [f"{1e3 * value:.0f}" for value in (percentiles.p50, percentiles.p95, percentiles.p99)]
    return [title, str(figures.requests), *cells]


def _table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{cell}</th>" for cell in heading) + "</tr>" if heading else ""
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table>{head}{''.join(lines)}</table>"


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _bars(rows: Sequence[Row], results: Sequence[ServerResult]) -> bytes:
    """Tokens a second of every scenario that compares them, with the confidence intervals."""
    shown = [row for row in rows if not row.measure.startswith("TTFT")]
    figure = _figure(9, 1 + 0.5 * len(shown) * max(1, len(results) / 2))
    axes = figure.subplots()
    thickness = 0.8 / len(results)
    for number, result in enumerate(results):
        values = [row.figures[result.name] for row in shown]
        places = np.arange(len(shown)) + number * thickness
        reach = [[value.mean - max(0.0, value.low) for value in values], [value.high - value.mean for value in values]]
        bars = axes.barh(places, [value.mean for value in values], thickness, xerr=reach, label=result.name, capsize=2)
        axes.bar_label(bars, fmt="%.1f", padding=6, fontsize=8)
    axes.set_yticks(np.arange(len(shown)) + 0.4 - thickness / 2, [row.title for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    axes.margins(x=0.15)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(results), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _timeline(scenario: Scenario, results: Sequence[ServerResult]) -> bytes:
    """Left: share of requests with a first token by then. Right: every request of the first repetition as a line."""
    figure = _figure(9, 2.2 + 0.8 * len(results))
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    for number, result in enumerate(results):
        ttft = sorted(one.ttft_s for replay in result.outcomes[scenario.name] for one in replay)
        left.step(ttft, np.arange(1, len(ttft) + 1) / len(ttft), where="post", label=result.name)
        replay = sorted(result.outcomes[scenario.name][0], key=lambda one: one.start_s)
        models = list(by_model(replay))
        for place, one in enumerate(replay):
            y = number + 0.85 * place / max(1, len(replay))
            right.plot([one.start_s, one.start_s + one.ttft_s], [y, y], color="0.8", lw=1.5)
            color = f"C{models.index(one.model) % 10}"
            right.plot([one.start_s + one.ttft_s, one.end_s], [y, y], color=color, lw=1.5)
    left.set(xlabel="TTFT, s", ylabel="share of requests", ylim=(0, 1.02))
    left.set_xlim(left=0)
    left.legend(fontsize=8, loc="lower right")
    right.set_yticks(np.arange(len(results)) + 0.4, [result.name for result in results])
    right.invert_yaxis()
    right.set(xlabel="s; grey until the first token, then a colour a model")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
