"""The four formats: how each is written, what it is compared with, and who loads it again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from adapters.base import BaseModel
from adapters.merge.export import llama_cpp
from adapters.merge.export.gguf_lora import LoraPlan, write_lora
from adapters.merge.export.gguf_model import GgufPlan, plan_gguf, write_model
from adapters.merge.export.hugging_face import write_nf4, write_plain
from adapters.merge.export.progress import Counter, Told
from adapters.merge.plan import Dtype

if TYPE_CHECKING:
    from adapters.merge.export.reader import Reader

DTYPES: Mapping[str, Dtype] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
STORED: Mapping[str, str] = {**DTYPES, "q8_0": "q8_0", "nf4": "nf4"}
"""Types of an export, as adapters/merge/formats.py calls them."""
HEARD_CONTEXT = 1024
"""Tokens; no probe is longer."""


@dataclass(frozen=True)
class Loaded:
    reader: Reader
    by: str
    """Which library, in which version."""


class Export(Protocol):
    loads_in: ClassVar[str]
    """For people."""
    max_kl: ClassVar[float | None]
    """What an export may differ from its source, in nats per token, where nobody says otherwise; None: anything."""

    @property
    def model(self) -> BaseModel:
        """Whose tokenizer it has."""

    @property
    def stored(self) -> str:
        """As adapters/merge/formats.py calls it."""

    @property
    def notes(self) -> tuple[str, ...]: ...

    def write(self, directory: Path, scratch: Path, told: Told) -> None: ...

    def source(self) -> AbstractContextManager[Reader]:
        """What it must be like."""

    def loaded(self, directory: Path, scratch: Path, told: Told) -> AbstractContextManager[Loaded | None]:
        """None where nothing here can load it."""


@dataclass(frozen=True)
class HuggingFace:
    model: BaseModel
    dtype: Dtype
    loads_in: ClassVar[str] = "transformers, vLLM, and whatever else reads Hugging Face's format"
    max_kl: ClassVar[float | None] = 0.01
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> str:
        return self.dtype

    def write(self, directory: Path, scratch: Path, told: Told) -> None:
        write_plain(self.model, directory, self.dtype, told)

    def source(self) -> AbstractContextManager[Reader]:
        return _transformers(self.model.path)

    @contextmanager
    def loaded(self, directory: Path, scratch: Path, told: Told) -> Iterator[Loaded | None]:
        with _transformers(directory) as reader:
            yield Loaded(reader, _versions("transformers"))


@dataclass(frozen=True)
class Nf4:
    model: BaseModel
    loads_in: ClassVar[str] = "transformers with bitsandbytes; vLLM with bitsandbytes (on a CPU with vllm-bnb-plugin)"
    max_kl: ClassVar[float | None] = None
    """Four bits cost what they cost: it is said, not forbidden."""
    notes: tuple[str, ...] = ()
    stored: str = "nf4"

    def write(self, directory: Path, scratch: Path, told: Told) -> None:
        write_nf4(self.model, directory, scratch, told)

    def source(self) -> AbstractContextManager[Reader]:
        return _transformers(self.model.path)

    @contextmanager
    def loaded(self, directory: Path, scratch: Path, told: Told) -> Iterator[Loaded | None]:
        with _transformers(directory) as reader:
            yield Loaded(reader, _versions("transformers", "bitsandbytes"))


@dataclass(frozen=True)
class Gguf:
    model: BaseModel
    plan: GgufPlan
    loads_in: ClassVar[str] = "llama.cpp and what is built on it: Ollama, LM Studio, llama-cpp-python"
    max_kl: ClassVar[float | None] = 0.01

    @property
    def stored(self) -> str:
        return STORED[self.plan.outtype]

    @property
    def notes(self) -> tuple[str, ...]:
        return self.plan.notes

    @property
    def file(self) -> str:
        return file_name(self.plan.origin.name, self.plan.outtype)

    def write(self, directory: Path, scratch: Path, told: Told) -> None:
        write_model(self.plan, directory / self.file, Counter(told, "writing GGUF", self.plan.size_bytes))

    def source(self) -> AbstractContextManager[Reader]:
        return _transformers(self.model.path)

    @contextmanager
    def loaded(self, directory: Path, scratch: Path, told: Told) -> Iterator[Loaded | None]:
        path = directory / self.file
        if llama_cpp.is_there():
            with llama_cpp.loaded(path, self.plan.decoder.vocabulary, context=HEARD_CONTEXT) as reader:
                yield Loaded(reader, llama_cpp.version())
        else:
            from adapters.merge.export.reader import load_gguf

            yield Loaded(
                load_gguf(path, self.model.path), f"{_versions('transformers')}, its reader of GGUF: weights only"
            )


@dataclass(frozen=True)
class GgufLora:
    adapter: Path
    model: BaseModel
    """The base."""
    plan: LoraPlan
    loads_in: ClassVar[str] = "llama.cpp beside the GGUF of its base (--lora), Ollama (ADAPTER)"
    max_kl: ClassVar[float | None] = 0.01
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> str:
        return self.plan.outtype

    @property
    def file(self) -> str:
        return file_name(self.plan.origin.name, f"lora-{self.plan.outtype}")

    def write(self, directory: Path, scratch: Path, told: Told) -> None:
        write_lora(self.plan, directory / self.file, Counter(told, "writing GGUF", self.plan.size_bytes))

    @contextmanager
    def source(self) -> Iterator[Reader]:
        from adapters.merge.export.reader import load

        yield load(self.model.path, adapter=self.adapter)

    @contextmanager
    def loaded(self, directory: Path, scratch: Path, told: Told) -> Iterator[Loaded | None]:
        if not llama_cpp.is_there():
            yield None
            return
        plan = plan_gguf(self.model, "f16", self.plan.origin)
        write_model(plan, scratch / "base.gguf", Counter(told, "the base as GGUF, to try it on", plan.size_bytes))
        lora, vocabulary = directory / self.file, plan.decoder.vocabulary
        with llama_cpp.loaded(scratch / "base.gguf", vocabulary, lora, context=HEARD_CONTEXT) as reader:
            yield Loaded(reader, f"{llama_cpp.version()} on the base as f16")


def file_name(name: str, suffix: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'model'}-{suffix}.gguf"


@contextmanager
def _transformers(model: Path) -> Iterator[Reader]:
    from adapters.merge.export.reader import load

    yield load(model)


def _versions(*libraries: str) -> str:
    return ", ".join(f"{library} {metadata.version(library)}" for library in libraries)
