"""The verdict on a staged adapter: a plain LoRA, kept for a merge, or refused.

    beyond a LoRA? else convert → a merge of it is planned, where only that can serve it → validate → manifest

What is kept for a merge is what a merge takes: every tensor has its place, from headers, and copies of the base's own
are that. Kinds that PEFT's own layers merge are compared with the base's names only; those layers are not built for
strangers here.
"""

from __future__ import annotations

from pathlib import Path

from adapters.base import WEIGHT, BaseModel
from adapters.convert import Verdict, convert
from adapters.convert.source import Source
from adapters.errors import MergeError
from adapters.json_document import read_document
from adapters.manifest import Manifest
from adapters.merge import embeddings, tokens
from adapters.merge.embeddings import HEAD, Ends
from adapters.merge.plan import plan_merge
from adapters.refusals import refuse
from adapters.upload import CONFIG, WEIGHTS
from adapters.validate import validate


def judge(staged: Path, base: BaseModel, max_rank: int, max_error: float = 0.0) -> Manifest:
    """Raises InvalidAdapter; its `code` is a key of REFUSALS. What is converted replaces what was staged."""
    verdict = _beyond_lora(staged, base) or convert(staged, base, max_rank, max_error)
    if verdict.merge_only is not None and _is_lora(staged):
        _require_mergeable(staged, base)
    return validate(staged, base, max_rank, verdict)


def _is_lora(staged: Path) -> bool:
    if not ((staged / CONFIG).is_file() and (staged / WEIGHTS).is_file()):
        return False
    return str(read_document(staged / CONFIG).get("peft_type", "LORA")).upper() == "LORA"


def _beyond_lora(staged: Path, base: BaseModel) -> Verdict | None:
    """Of an adapter on the embedding or the head, or of single tokens; None for every other."""
    if not _is_lora(staged):
        return None
    source = Source.read(staged, base)
    found = [what for what, is_there in _on_ends(source).items() if is_there]
    if not found:
        return None
    _require_tokens_of_ends(source)
    what = " and ".join(found)
    return Verdict(merge_only=f"it changes {what}, which all requests of an engine share")


def _on_ends(source: Source) -> dict[str, bool]:
    names = source.spans
    return {
        "the embedding": any(embeddings.PART.fullmatch(name) for name in names),
        "the head": any(name.startswith(f"{HEAD}.lora_") for name in names) or _trains_tied_head(source),
        "embeddings of single tokens": any(tokens.NAME.fullmatch(name) for name in names),
    }


def _trains_tied_head(source: Source) -> bool:
    """Where the head is a tensor of the base's own, it is compared with that, as every whole module."""
    head = (f"{HEAD}{WEIGHT}", f"{HEAD}.modules_to_save{WEIGHT}")
    return Ends.of(source.base_weights).tied and any(name in source.spans for name in head)


def _require_tokens_of_ends(source: Source) -> None:
    ends = Ends.of(source.base_weights)
    for name in source.spans:
        match = tokens.NAME.fullmatch(name)
        if match is not None and match["module"] + WEIGHT not in (ends.embedding, ends.head):
            raise refuse("unknown_module", f"tokens were trained of {name[:200]!r}, which is no embedding")


def _require_mergeable(staged: Path, base: BaseModel) -> None:
    try:
        plan_merge(staged, base)
    except MergeError as error:
        raise refuse("not_mergeable", f"no engine can swap it, and no merge takes it: {error.message}") from error
