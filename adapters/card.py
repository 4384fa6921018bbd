"""A version's model card, made from what is known of it, for versions whose files hold none. Markdown.

Words of strangers stand in it as code, so that none of them becomes markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from adapters.records import About, Version


def generated(version: Version, about: About) -> str:
    return "\n".join(_lines(version, about)) + "\n"


def _lines(version: Version, about: About) -> Iterator[str]:
    manifest = version.manifest
    yield f"# {version.ref}"
    yield f"\nAn adapter for {_code(manifest.base_model or 'a base that it does not name')}: {manifest.verdict}."
    facts = {
        "digest": version.digest,
        "kind": f"{manifest.kind}, rank {manifest.rank}, alpha {manifest.alpha:g}, {manifest.dtype}",
        "changes": f"{manifest.module_count} modules: {', '.join(manifest.target_modules)}",
        "size": f"{manifest.parameter_count:,} parameters, {manifest.size_bytes:,} bytes",
        "state": version.state + (f": {version.reason}" if version.reason else ""),
        "uploaded": version.created_at.strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    yield from _table("", {**facts, **({"aliases": ", ".join(about.aliases)} if about.aliases else {})})
    yield from _table("Tags", about.tags)
    yield from _table("Scores", manifest.scores)
    yield from _table("Lineage", manifest.lineage)
    yield from _table("Probe", version.probe or {})
    if manifest.warnings:
        yield "\n## Warnings\n"
        yield from (f"- {_code(warning)}" for warning in manifest.warnings)


def _table(title: str, facts: Mapping[str, Any]) -> Iterator[str]:
    if facts:
        yield f"\n## {title}\n" if title else ""
        yield "| | |\n|---|---|"
        yield from (f"| {_code(key)} | {_code(value)} |" for key, value in facts.items())


def _code(value: Any) -> str:
    """On one line, in a code span, fit for a cell of a table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "¦") + "`" if text.strip() else ""
