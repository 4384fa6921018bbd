"""What stands in a merged model's directory beside its weights: configuration, tokenizer, index, record, card, sums."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from adapters.base import CONFIG, INDEX, SINGLE
from adapters.checksums import sha256_of
from adapters.merge.plan import MergePlan
from adapters.provenance import read_provenance
from adapters.upload import PROVENANCE, README, TOKENIZER_FILES

RECORD = "loraplex-merge.json"
EXPORT_RECORD = "loraplex-export.json"
"""Of adapters/merge/export."""
SUMS = "SHA256SUMS"
SMALL = (".json", ".jinja", ".model", ".txt")
TEMPLATE = "chat_template.jinja"
DTYPE_KEYS = ("dtype", "torch_dtype")
LIBRARIES = ("loraplex", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


def write_model_files(plan: MergePlan, directory: Path) -> None:
    """With the shards, a model that loads."""
    for name, path in _small_files(plan).items():
        shutil.copyfile(path, directory / name)
    (directory / CONFIG).write_text(json.dumps(_config(plan), indent=2) + "\n", encoding="utf-8")
    if plan.shards != (SINGLE,):
        weight_map = {each.name: each.shard for each in plan.planned}
        index = {"metadata": {"total_size": plan.size_bytes}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_record(
    plan: MergePlan, directory: Path, shards: Mapping[str, str], fidelity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`shards`: their sums."""
    record = record_of(plan) | {"shards": dict(shards)}
    if fidelity is not None:
        record["fidelity"] = dict(fidelity)
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (directory / README).write_text(card(plan), encoding="utf-8")
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != "unfinished.json")
    sums = {name: shards.get(name) or sha256_of(directory / name) for name in names}
    (directory / SUMS).write_text("".join(f"{hexed}  {name}\n" for name, hexed in sums.items()), encoding="utf-8")
    return record


def record_of(plan: MergePlan) -> dict[str, Any]:
    return {
        "plan": plan.digest,
        "base": {"name": plan.base.name, "fingerprint": plan.base.fingerprint},
        "values": plan.choice.values,
        "reason": plan.choice.reason,
        "adapter": {"name": plan.adapter.resolve().name, "digest": plan.adapter_digest, "kind": plan.kind},
        **_composition(plan),
        "dtype": plan.dtype,
        "kinds": dict(Counter(each.operation.kind for each in plan.planned if each.operation is not None)),
        "changed": [each.name for each in plan.changed],
        "size_bytes": plan.size_bytes,
        "config": dict(plan.changes_config),
        "notes": list(plan.notes),
        "versions": dict(_versions()),
    }


def _composition(plan: MergePlan) -> dict[str, Any]:
    """Of an adapter that was made of several: which, and how. It may have lived for this merge only."""
    lineage = read_provenance(plan.adapter / PROVENANCE).lineage
    told = {key: lineage[key] for key in ("parents", "composition", "composition_error") if key in lineage}
    return {"composed": told} if "composition" in told else {}


CARD = """\
---
{header}---

# {base}, merged with {adapter}

One model: the weights of `{base}` with what the adapter `{adapter}` changes of them. It is served with no adapter.

| | |
|---|---|
| base | `{base}`, fingerprint `{fingerprint}` |
| its values | {values}: {reason} |
| adapter | `{adapter}`, {kind}, digest `{digest}` |
| changed | {changed} of {all} tensors: {kinds} |
| stored as | {dtype}, computed in float32 and rounded once |

{notes}Library versions, the sums of the weights and what was measured are in `{record}`, the sums of all files in
`{sums}`.
"""


def card(plan: MergePlan) -> str:
    header = {
        "library_name": "transformers",
        "base_model": plan.base.name,
        "base_model_relation": "merge",
        "tags": ["merge", plan.kind, "loraplex"],
    }
    facts = record_of(plan)
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        base=plan.base.name,
        adapter=facts["adapter"]["name"],
        fingerprint=plan.base.fingerprint,
        values=plan.choice.values,
        reason=plan.choice.reason,
        kind=plan.kind,
        digest=plan.adapter_digest,
        changed=len(plan.changed),
        all=len(plan.planned),
        kinds=", ".join(f"{count} × {kind}" for kind, count in facts["kinds"].items()),
        dtype=plan.dtype,
        notes="".join(f"- {note}\n" for note in plan.notes) + ("\n" if plan.notes else ""),
        record=RECORD,
        sums=SUMS,
    )


def _config(plan: MergePlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((plan.base.path / CONFIG).read_text(encoding="utf-8"))
    found.pop("quantization_config", None)
    if not any(key in found for key in DTYPE_KEYS):
        found["dtype"] = plan.dtype
    set_dtype(found, plan.dtype)
    return found | plan.changes_config


def set_dtype(section: dict[str, Any], dtype: str) -> None:
    """Also of the parts of a model that has several."""
    for key, value in section.items():
        if key in DTYPE_KEYS:
            section[key] = dtype
        elif isinstance(value, dict):
            set_dtype(value, dtype)


def _small_files(plan: MergePlan) -> dict[str, Path]:
    """Tokenizer and template as the adapter brings them (`plan` compared them), else the base's."""
    skipped = (CONFIG, INDEX, RECORD, EXPORT_RECORD)
    found = {path.name: path for path in plan.base.path.iterdir() if path.is_file() and path.suffix in SMALL}
    found = {name: path for name, path in found.items() if name not in skipped}
    own = {name: plan.adapter / name for name in TOKENIZER_FILES if (plan.adapter / name).is_file()}
    if TEMPLATE not in own and _has_template(own.get("tokenizer_config.json")):
        found.pop(TEMPLATE, None)  # a file of that name would be preferred to the adapter's own
    return found | own


def _has_template(path: Path | None) -> bool:
    return path is not None and "chat_template" in json.loads(path.read_text(encoding="utf-8"))


def _versions() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
