"""What stands beside an export: its record, a model card, the sums of all files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adapters.checksums import sha256_of
from adapters.merge.documents import EXPORT_RECORD, SUMS
from adapters.merge.export.origin import Origin
from adapters.upload import README

if TYPE_CHECKING:
    from adapters.merge.export.hearing import Check

RELATIONS = {"gguf-lora": "adapter", "nf4": "quantized"}
LIBRARIES = ("loraplex", "torch", "transformers", "peft", "bitsandbytes", "gguf", "xllamacpp")


@dataclass(frozen=True)
class Facts:
    """Of one export."""

    format: str
    outtype: str
    loads_in: str
    origin: Origin
    check: Check | None
    kept: float | None
    """What the format keeps of what the adapter changed; 1 is all of it."""
    accepted: Mapping[str, str]
    """What would have been refused, had nobody accepted it: `loss`, `differences` → what that was."""
    notes: tuple[str, ...]


def write_documents(facts: Facts, directory: Path) -> Mapping[str, Any]:
    """Last of all; returns what the record says."""
    weights = [path for path in sorted(directory.iterdir()) if path.suffix in (".gguf", ".safetensors")]
    record = {
        "format": facts.format,
        "outtype": facts.outtype,
        "name": facts.origin.name,
        "files": {path.name: path.stat().st_size for path in weights},
        "license": facts.origin.license,
        "lineage": facts.origin.lineage,
        "adapter_kept": facts.kept,
        "check": facts.check.record() if facts.check else None,
        "accepted": dict(facts.accepted),
        "notes": list(facts.notes),
        "versions": {library: version for library in LIBRARIES if (version := _version(library))},
    }
    (directory / EXPORT_RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / README).write_text(card(facts), encoding="utf-8")
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != SUMS)
    sums = "".join(f"{sha256_of(path)}  {path.name}\n" for path in files)
    (directory / SUMS).write_text(sums, encoding="utf-8")
    return record


def card(facts: Facts) -> str:
    origin = facts.origin
    head: dict[str, Any] = {"library_name": "gguf" if facts.format.startswith("gguf") else "transformers"}
    if origin.license:
        head["license"] = origin.license
    if origin.base:
        head |= {"base_model": origin.base, "base_model_relation": RELATIONS.get(facts.format, "merge")}
    head["tags"] = ["loraplex", facts.format]
    rows = {"format": f"{facts.format}, {facts.outtype}", "loads in": facts.loads_in, **origin.lineage}
    lines = [
        f"# {origin.name}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
    ]
    lines += ["", "## How near it is to its source", "", *_nearness(facts)]
    if facts.notes:
        lines += ["", "## Notes", "", *(f"- {_cell(note)}" for note in facts.notes)]
    lines += ["", f"The figures as JSON are in `{EXPORT_RECORD}`, the sums of all files in `{SUMS}`.", ""]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n".join(lines)


def _nearness(facts: Facts) -> Iterator[str]:
    if facts.check is None:
        yield "Not loaded again: nothing on the machine that made it could."
    else:
        parity = facts.check.parity
        yield f"Loaded again by {facts.check.by}, {parity.tokens} tokens of {facts.check.probes}:"
        yield ""
        yield from ("| | |", "|---|---|")
        yield f"| KL to the source, nats per token | {parity.kl:.5f} |"
        yield f"| mean and largest \\|Δ log-probability\\| | {parity.mean_change:.4f}, {parity.largest_change:.4f} |"
        yield f"| the likeliest token is the same | {parity.same_first:.1%} |"
        yield f"| loss, of the source and of this | {parity.source_loss:.4f}, {parity.loss:.4f} |"
        yield f"| greedy answers go on the same for | {facts.check.same_answers:.0%} of their tokens |"
    if facts.kept is not None:
        yield ""
        yield (
            f"Of what the adapter changed in the weights, {facts.kept:.1%} is left in {facts.outtype} (by size; below "
            "100 %: changes smaller than the steps of the format do not cross them)."
        )
    for what in facts.accepted.values():
        yield ""
        yield f"**Accepted by whoever made it:** {_cell(what)}"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
