"""`python -m adapters.merge.worker DIRECTORY`: one merge for a server, in a process of its own, out of its way.

`order.json` there says what. How it speaks and how it ends: adapters/background.py; its last message has `done`, also
where a predecessor had come to the end of it already. It knows no server.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.background import Duty, Tell, serve
from adapters.checksums import sha256_of
from adapters.json_document import read_document
from adapters.merge.apply import write_merged
from adapters.merge.bases import for_nf4
from adapters.merge.compose import compose
from adapters.merge.documents import EXPORT_RECORD
from adapters.merge.export.exporting import TOKENS, Wish
from adapters.merge.export.exporting import export as write_export
from adapters.merge.export.formats import DTYPES, STORED
from adapters.merge.orders import ComposeOrder, ExportOrder, MergeOrder, Order, Proof, read_order, recipe_of
from adapters.merge.plan import Dtype, MergePlan, plan_merge
from adapters.merge.report import FidelityReport
from adapters.merge.verify import Wishes, check_of, read_report, summary
from adapters.upload import PROVENANCE

MERGED = "merged"
TELL_S = 0.1
"""Between two messages about how far it is."""


def main(argv: Sequence[str]) -> int:
    duty = Duty(
        module="adapters.merge.worker",
        work=lambda tell: tell({"done": dict(work(read_order(Path()), tell))}),
        doing="merging",
        setting="merge_memory_bytes",
        advice="raise the limit",
    )
    return serve(duty, argv)


def work(order: Order, tell: Tell) -> Mapping[str, Any]:
    """What the server keeps of it."""
    match order:
        case MergeOrder():
            return merge(order, tell)
        case ExportOrder():
            return export(order, tell)
        case ComposeOrder():
            return combined(order, tell)


def merge(order: MergeOrder, tell: Tell) -> Mapping[str, Any]:
    tell({"stage": "planning"})
    plan = plan_merge(Path(order.adapter), order.base.read(), order.values, order.dtype)
    return merged(plan, Path(order.destination), order.proof, tell)


def merged(
    plan: MergePlan, destination: Path, proof: Proof, tell: Tell, stored: str | None = None
) -> Mapping[str, Any]:
    """The merge's record, with the whole report as `report` and what stands of it in lists as `fidelity`. `stored`: the
    format that it becomes later, and is judged in."""
    wishes = Wishes(
        data=tuple(map(Path, proof.data)),
        tokens=proof.tokens,
        budget=proof.budget,
        accept_loss=proof.accept_loss,
        stored=stored,
    )

    def shown(report: FidelityReport) -> None:
        """Before it is judged: of a merge that is refused it is all that stays."""
        figures = {"fidelity": summary(report, wishes.budget), "report": report.to_json(modules=False)}
        tell({"stage": "measured", **figures})

    check = check_of(plan, wishes, _measuring(tell), shown)
    record = write_merged(plan, destination, progress(tell, "merging", plan.size_bytes), check)
    report = read_report(destination)
    return {**record, "report": report.to_json(), "fidelity": summary(report, wishes.budget)}


def export(order: ExportOrder, tell: Tell) -> Mapping[str, Any]:
    """`files` and the `report`: of the merge, and of what was loaded again."""
    if order.format == "hf":
        assert order.outtype is not None
        report = _kept(_merged_as(DTYPES[order.outtype], order, order.destination, tell))
    elif order.format == "gguf-lora":
        report = exported(order, Path(order.adapter), tell)
    else:
        # In fp32, so that a weight is rounded once; here, so that a later attempt goes on with it.
        merged_model = Path(MERGED).absolute()
        report = _kept(_merged_as("float32", order, str(merged_model), tell)) | exported(order, merged_model, tell)
    tell({"stage": "hashing"})
    return {"files": listed(Path(order.destination)), "report": report}


def exported(order: ExportOrder, source: Path, tell: Tell) -> dict[str, Any]:
    """`export`: what the export's record says."""
    destination = Path(order.destination)
    if not destination.exists():
        for left in destination.parent.glob(f".{destination.name}.*"):
            shutil.rmtree(left)  # of an attempt that was killed
        wish = Wish(
            source=source,
            destination=destination,
            format=order.format,
            outtype=order.outtype,
            base=Path(order.base.path),
            values=order.values,
            tokens=min(TOKENS, order.proof.tokens),
            max_kl=None if order.format == "nf4" else order.proof.max_kl,  # that of NF4 was from the adapter, and kept
            accept_loss=order.proof.accept_loss,
            accept_differences=order.proof.accept_differences,
        )
        told = _Seldom(tell)
        write_export(
            wish, lambda what, at, of: told({"stage": "exporting", "what": what, "at": at, "of": of}, at == of)
        )
    return {"export": json.loads((destination / EXPORT_RECORD).read_text(encoding="utf-8"))}


def _merged_as(dtype: Dtype, order: ExportOrder, destination: str, tell: Tell) -> Mapping[str, Any]:
    tell({"stage": "planning"})
    base = order.base.read()
    values = for_nf4(base, order.values) if order.format == "nf4" else order.values
    plan, stored = (
        plan_merge(Path(order.adapter), base, values, dtype),
        STORED[order.outtype] if order.outtype else dtype,
    )
    return merged(plan, Path(destination), order.proof, tell, stored)


def _kept(done: Mapping[str, Any]) -> dict[str, Any]:
    names = ("plan", "values", "reason", "dtype", "kinds", "notes", "versions", "fidelity", "report")
    return {name: done[name] for name in names}


def combined(order: ComposeOrder, tell: Tell) -> Mapping[str, Any]:
    """What stands in the new adapter's lineage, too."""
    destination, told = Path(order.destination), _Seldom(tell)
    tell({"stage": "planning"})
    if not destination.exists():
        compose(
            [Path(adapter) for adapter in order.adapters],
            order.base.read(),
            recipe_of(order.recipe),
            destination,
            lambda done, of: told({"stage": "combining", "at": done, "of": of}, done == of),
        )
    lineage = read_document(destination / PROVENANCE)["lineage"]
    return {key: lineage[key] for key in ("composition", "composition_error", "distance_from_sum")}


def listed(directory: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    return [{"name": path.name, "size_bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]


def _measuring(tell: Tell) -> Callable[[str, int, int], None]:
    told = _Seldom(tell)
    return lambda what, done, of: told({"stage": "measuring", "what": what, "at": done, "of": of}, done == of)


def progress(tell: Tell, stage: str, total_bytes: int) -> Callable[[str, int], None]:
    """Called with a tensor's name and its bytes; says how many there are now."""
    done, told = 0, _Seldom(tell)

    def advance(_: str, size: int) -> None:
        nonlocal done
        done += size
        told({"stage": stage, "bytes": done, "total_bytes": total_bytes}, done >= total_bytes)

    return advance


class _Seldom:
    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._last = 0.0

    def __call__(self, message: dict[str, Any], is_last: bool) -> None:
        if is_last or time.monotonic() - self._last > TELL_S:
            self._last = time.monotonic()
            self._tell(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
