"""FLOW export: open the source → write → load again → measure → say so → appear.

All of it happens in a directory beside the destination, which appears whole and measured, or not at all.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from adapters.errors import Conflict, NotExportable, NotTheSame
from adapters.merge.bases import Asked
from adapters.merge.export.formats import DTYPES, Export, Gguf, GgufLora, HuggingFace, Nf4
from adapters.merge.export.gguf_file import OutType
from adapters.merge.export.gguf_lora import plan_lora
from adapters.merge.export.gguf_model import plan_gguf
from adapters.merge.export.modelfile import modelfile, rendering, take_apart
from adapters.merge.export.origin import Origin, license_of, origin_of
from adapters.merge.export.progress import Told
from adapters.merge.export.record import Facts, write_documents
from adapters.merge.export.sources import is_adapter, merged, require_base
from adapters.merge.files import digest_of_adapter, require_same_base
from adapters.merge.report import LEAST_KEPT
from adapters.staging import staged

if TYPE_CHECKING:
    from adapters.merge.export.hearing import Check

Format = Literal["hf", "nf4", "gguf", "gguf-lora"]
FORMATS: tuple[Format, ...] = get_args(Format)
TYPES: Mapping[Format, tuple[str, ...]] = {
    "hf": ("bf16", "f16", "f32"),
    "nf4": ("nf4",),
    "gguf": ("f16", "bf16", "q8_0", "f32"),
    "gguf-lora": ("f32", "f16", "bf16"),
}
"""Of each format, the one that is taken by default first."""
LOSS, DIFFERENCES = "loss", "differences"
"""What can be accepted of an export: how far it is from its source, and that it reads texts or chats otherwise."""
ENDS = ("eos", "eot", "eom")
MODELFILE = "Modelfile"
TOKENS = 192
"""So many predicted tokens are compared. What goes wrong shows at each of them."""


@dataclass(frozen=True)
class Wish:
    source: Path
    """A merged model, or an adapter."""
    destination: Path
    format: Format
    outtype: str | None = None
    base: Path | None = None
    """Of an adapter."""
    values: Asked = "auto"
    """Of the base, that an adapter is merged into."""
    name: str | None = None
    license: str | None = None
    ollama: bool = False
    tokens: int = TOKENS
    """0: it is not loaded again."""
    max_kl: float | None = None
    """None: what is usual for the format."""
    accept_loss: bool = False
    """Keep it however far it is from its source, and say so."""
    accept_differences: bool = False
    """Keep it although whoever loads it reads texts or chats otherwise, and say so."""


@dataclass(frozen=True)
class Opened:
    """What a wish means: what is written, and what is known of where it comes from."""

    export: Export
    origin: Origin
    kept: float | None
    notes: tuple[str, ...]


def export(wish: Wish, told: Told = lambda what, done, of: None) -> Mapping[str, Any]:
    """`destination` becomes a directory with the files, a card, sums, and `loraplex-export.json`, which is returned.

    Raises NotExportable, NotTheSame, Conflict where something is there; MergeError and InvalidAdapter from merging.
    """
    from adapters.train.quiet import quiet_libraries

    outtype = _outtype(wish)
    _require_free(wish.destination)
    with quiet_libraries(), _scratch(wish.destination) as scratch, staged(wish.destination) as staging:
        opened = _open(wish, outtype, scratch, told)
        opened.export.write(staging, scratch, told)
        if wish.ollama:
            _write_modelfile(opened.export, staging)
        check = _check(wish, opened.export, staging, scratch, told) if wish.tokens else None
        accepted = _judge(wish, opened, check)
        facts = Facts(
            format=wish.format,
            outtype=outtype,
            loads_in=opened.export.loads_in,
            origin=opened.origin,
            check=check,
            kept=opened.kept,
            accepted=accepted,
            notes=opened.notes,
        )
        return write_documents(facts, staging)


def _open(wish: Wish, outtype: str, scratch: Path, told: Told) -> Opened:
    """Raises NotExportable before anything large is written, where it can be known."""
    if wish.format == "gguf-lora":
        return _open_lora(wish, outtype)
    found = merged(wish.source, wish.base, wish.values, scratch, told, to_nf4=wish.format == "nf4")
    origin = origin_of(found.model.path, wish.name, wish.license or (license_of(wish.base) if wish.base else None))
    made: Export
    if wish.format == "hf":
        made = HuggingFace(found.model, DTYPES[outtype])
    elif wish.format == "nf4":
        made = Nf4(found.model)
    else:
        made = Gguf(found.model, plan_gguf(found.model, cast(OutType, outtype), origin))
    return Opened(made, origin, found.kept(made.stored), (*found.notes, *made.notes))


def _open_lora(wish: Wish, outtype: str) -> Opened:
    if not is_adapter(wish.source):
        raise NotExportable(f"{wish.source} is no adapter: there is no LoRA in it to write", code="no_source")
    base = require_base(wish.source, wish.base)
    notes = tuple(require_same_base(wish.source, base))
    origin = Origin(
        name=wish.name or wish.source.resolve().name,
        base=base.name,
        base_fingerprint=base.fingerprint,
        adapter=wish.source.resolve().name,
        adapter_digest=digest_of_adapter(wish.source),
        license=wish.license or license_of(wish.source) or license_of(base.path),
    )
    made = GgufLora(wish.source, base, plan_lora(wish.source, base, cast(OutType, outtype), origin))
    return Opened(made, origin, None, notes)


def _check(wish: Wish, made: Export, staging: Path, scratch: Path, told: Told) -> Check | None:
    """The source is heard and let go first: one model is in memory at a time."""
    from adapters.merge.export.hearing import gathered, hear, judge
    from adapters.merge.export.reader import load_tokenizer

    texts = gathered(wish.source, load_tokenizer(made.model.path), wish.tokens)
    told("what the source says", 0, 2)
    with made.source() as reader:
        source = hear(reader, texts)
    del reader
    gc.collect()  # PEFT's layers point at each other
    told("what the export says", 1, 2)
    with made.loaded(staging, scratch, told) as loaded:
        if loaded is None:
            return None
        check = judge(source, hear(loaded.reader, texts), loaded.by, texts.source)
    told("what the export says", 2, 2)
    return check


def _judge(wish: Wish, opened: Opened, check: Check | None) -> Mapping[str, str]:
    """What is accepted, and what there was to accept. Raises NotTheSame where somebody would have to."""
    from adapters.merge.export.hearing import require_near, require_same_reading

    found: dict[str, str] = {}

    @contextmanager
    def unless(is_accepted: bool, what: str) -> Iterator[None]:
        try:
            yield
        except NotTheSame as error:
            if not is_accepted:
                raise
            found[what] = f"{found[what]}; {error.message}" if what in found else error.message

    with unless(wish.accept_loss, LOSS):
        _require_kept(opened)
    if check is not None:
        with unless(wish.accept_differences, DIFFERENCES):
            require_same_reading(check)
        with unless(wish.accept_loss, LOSS):
            require_near(check, opened.export.max_kl if wish.max_kl is None else wish.max_kl)
    return found


def _require_kept(opened: Opened) -> None:
    if opened.kept is not None and not opened.kept >= LEAST_KEPT:
        raise NotTheSame(
            f"of what the adapter changed {opened.kept:.1%} is left in {opened.export.stored}, at least "
            f"{LEAST_KEPT:.0%}; take the base's values before NF4 (--from original), or a type with more bits; or "
            "accept it (accept_loss)"
        )


def _write_modelfile(made: Export, staging: Path) -> None:
    from adapters.merge.export.reader import load_tokenizer

    if not isinstance(made, Gguf):
        raise NotExportable("Ollama reads GGUF: --ollama goes with --format gguf", code="unknown_template")
    tokenizer, vocabulary = load_tokenizer(made.model.path), made.plan.vocabulary
    if not tokenizer.chat_template:
        raise NotExportable(
            f"{made.model.name} has no chat template, so nothing says how to ask it; leave --ollama out",
            code="unknown_template",
        )
    ends = [vocabulary.tokens[vocabulary.special[name]] for name in ENDS if name in vocabulary.special]
    (staging / MODELFILE).write_text(modelfile(made.file, take_apart(rendering(tokenizer)), ends), encoding="utf-8")


def _outtype(wish: Wish) -> str:
    allowed = TYPES[wish.format]
    if wish.outtype is None:
        return allowed[0]
    if wish.outtype not in allowed:
        raise NotExportable(
            f"--format {wish.format} is not written as {wish.outtype}; take one of {', '.join(allowed)}",
            code="bad_outtype",
        )
    return wish.outtype


def _require_free(destination: Path) -> None:
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise Conflict(f"{destination} is there already; name a directory that is not", code="not_empty")


@contextmanager
def _scratch(destination: Path) -> Iterator[Path]:
    """On the same disk, for what it holds may be as large as the export."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.scratch.", dir=destination.parent) as path:
        yield Path(path)
