"""Where a model comes from, as its record and its card say; what of that goes into a GGUF file and a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adapters.merge.documents import EXPORT_RECORD, RECORD
from adapters.upload import README

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Origin:
    name: str
    base: str | None = None
    base_fingerprint: str | None = None
    adapter: str | None = None
    adapter_digest: str | None = None
    values: str | None = None
    """Of the base, that the adapter was merged into: dequantized or original."""
    license: str | None = None

    @property
    def lineage(self) -> dict[str, str]:
        """What is known of it."""
        found = {
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "adapter": self.adapter,
            "adapter_digest": self.adapter_digest,
            "values": self.values,
        }
        return {key: value for key, value in found.items() if value is not None}


def origin_of(model: Path, name: str | None = None, license_name: str | None = None) -> Origin:
    """`model`: a merged directory, or any other in Hugging Face's form."""
    record = _json(model / RECORD)
    base, adapter = record.get("base", {}), record.get("adapter", {})
    if not record and (exported := _json(model / EXPORT_RECORD)):
        return replace(
            Origin(exported["name"], license=exported["license"], **exported["lineage"]),
            **{key: value for key, value in {"name": name, "license": license_name}.items() if value},
        )
    return Origin(
        name=name or (f"{base['name']} {adapter['name']}" if base and adapter else model.resolve().name),
        base=base.get("name"),
        base_fingerprint=base.get("fingerprint"),
        adapter=adapter.get("name"),
        adapter_digest=adapter.get("digest"),
        values=record.get("values"),
        license=license_name or license_of(model),
    )


def license_of(directory: Path) -> str | None:
    """By the head of its card."""
    card = directory / README
    if not card.is_file():
        return None
    opening, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    head, closed, _ = rest.partition("\n---")
    if opening.strip() or not closed:
        return None
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return None
    return str(found["license"]) if isinstance(found, dict) and isinstance(found.get("license"), str) else None


def describe(writer: GGUFWriter, origin: Origin) -> None:
    writer.add_name(origin.name)
    if origin.license is not None:
        writer.add_license(origin.license)
    if origin.base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, origin.base)
    for key, value in origin.lineage.items():
        writer.add_string(f"loraplex.{key}", value)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
