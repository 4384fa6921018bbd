"""The siege: over a thousand malformed and hostile uploads, made by hand and by mutation. None is accepted, none raises
anything but a refusal that says what to do, none leaves a byte, none fills the memory.

tests/flows/test_siege.py sends a sample of each family to a real server.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from adapters.base import BaseModel
from adapters.errors import AdapterError
from adapters.ingest import Ingest
from adapters.local_store import LocalStore
from adapters.refusals import REFUSALS
from adapters.registry import Registry
from tests.adapters import hostile, mutants
from tests.adapters.conftest import MAX_RANK, Shop
from tests.adapters.factories import AdapterFiles, lora_config, write_base
from tests.adapters.hostile import CANARY, Hostile

REPOSITORY = Path(__file__).parents[2]
OF_BYTES, OF_STRUCTURE = 900, 600
WHAT_TO_DO = re.compile(r"; |expected|at most|use |pack it|send |upload ")
TABLES = ("adapters", "adapter_versions", "adapter_alias_targets", "adapter_alias_moves")


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """One shop for all of them, with a good adapter in it."""
    root = tmp_path_factory.mktemp("besieged")
    base = BaseModel.read(write_base(root / "tiny"))
    store, registry = LocalStore(root / "store"), Registry(f"sqlite:///{root}/registry.db")
    shop = Shop(root / "store", base, store, registry, Ingest(store, registry, base, hostile.LIMITS, MAX_RANK))
    shop.ingest.upload("good", AdapterFiles().uploads())
    yield shop
    registry.close()


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def everything(shop: Shop) -> dict[str, object]:
    """Files of the store, of the place around it and of the temporary directory; rows of the registry."""
    found: dict[str, object] = dict(shop.contents())
    around = [shop.root.parent, Path(tempfile.gettempdir())]
    found |= {
        str(path): path.is_file() for place in around for path in place.rglob("*") if "registry.db" not in path.name
    }
    engine = create_engine(f"sqlite:///{shop.root.parent}/registry.db")
    with engine.connect() as connection:
        for table in TABLES:
            found[table] = [tuple(row) for row in connection.execute(text(f"SELECT * FROM {table} ORDER BY 1, 2"))]
    engine.dispose()
    assert not CANARY.exists()
    return found


def refusal(shop: Shop, case: Hostile) -> AdapterError | None:
    try:
        version, created = shop.ingest.upload("bad", case.uploads())
    except AdapterError as error:
        return error
    except BaseException as error:
        raise AssertionError(f"{case} broke the gate") from error
    if case.family != "mutant":
        raise AssertionError(f"{case} was accepted as {version.ref}")
    mutants.require_valid(shop.store.path(version.digest), version.digest)
    assert created
    shop.ingest.forget("bad", version.number, with_aliases=True)
    return None


def require_helpful(case: Hostile, error: AdapterError) -> None:
    assert not case.codes or error.code in case.codes, f"{case}: {error.code}: {error}"
    assert 20 < len(error.message) < 700, f"{case}: {error}"
    assert error.message.isprintable() or error.message.replace("\n", " ").isprintable(), f"{case}: {error!r}"
    if error.code in REFUSALS:
        assert error.message.endswith(REFUSALS[error.code]), f"{case}: {error}"
    else:
        assert WHAT_TO_DO.search(error.message), f"{case}: {error}"


@pytest.mark.parametrize("family", hostile.names())
def test_a_family_is_refused_to_the_last_and_leaves_nothing(besieged: Shop, family: str) -> None:
    before = everything(besieged)
    cases = 0
    for case in hostile.of_family(family):
        error = refusal(besieged, case)
        assert error is not None
        require_helpful(case, error)
        assert besieged.contents() == {name: content for name, content in before.items() if name in besieged.contents()}
        cases += 1
    assert cases > 3
    assert everything(besieged) == before


def test_there_are_many_of_them() -> None:
    contents = {hashlib.sha256(repr(case.sent).encode()).digest() for case in hostile.every()}
    assert len(contents) >= 1000


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutants_are_refused_or_good_adapters_still(besieged: Shop, seed: int) -> None:
    before = everything(besieged)
    outcomes: Counter[str] = Counter()
    of_bytes, of_structure = mutants.of_bytes(seed, OF_BYTES), mutants.of_structure(seed, OF_STRUCTURE)
    for case in (*of_bytes, *of_structure):
        error = refusal(besieged, case)
        if error is not None:
            require_helpful(case, error)
        outcomes[error.code if error else "accepted"] += 1
    assert outcomes["accepted"] < 0.25 * outcomes.total(), outcomes
    assert outcomes.total() - outcomes["accepted"] > 1000, outcomes
    assert len(outcomes) > 12, outcomes
    left = everything(besieged)
    for table in ("adapters", "adapter_alias_moves"):  # of names and moves a deletion keeps a record
        before.pop(table), left.pop(table)
    assert left == before


def test_a_mutant_with_checksums_is_the_original_or_nothing(besieged: Shop) -> None:
    packed = {name: mutants.PACKED[name](mutants.WHOLE) for name in mutants.CHECKED}
    original, _ = besieged.ingest.upload(
        "original", hostile.Hostile("", "", [("a.zip", packed["a.zip"])], frozenset()).uploads()
    )
    for case in mutants.of_bytes(4, 600):
        if case.sent[0][0] in mutants.CHECKED:
            try:
                version, _ = besieged.ingest.upload("original", case.uploads())
            except AdapterError:
                continue
            assert version == original, case
    besieged.ingest.forget("original", original.number, with_aliases=True)


@pytest.mark.parametrize(
    "text", ["\0", "\uffff", "😀", "'; DROP TABLE adapters; --", 10**4000], ids=lambda text: ascii(text)[:24]
)
def test_texts_that_a_database_might_choke_on(
    tmp_path: Path, tiny_base: BaseModel, postgres: Callable[[], str], text: object
) -> None:
    """Whatever the gate lets in as lineage or as an option that means nothing, PostgreSQL takes as well."""
    registry = Registry(postgres())
    ingest = Ingest(LocalStore(tmp_path / "store"), registry, tiny_base, hostile.LIMITS, MAX_RANK)
    provenance = json.dumps({"lineage": {"run": text, str(text)[:9]: text}}).encode()
    adapter = AdapterFiles(config=lora_config(**{str(text)[:9]: text}), extra={"loraplex.json": provenance})
    version, _ = ingest.upload("a", adapter.uploads())
    assert registry.resolve("a").manifest == version.manifest
    assert version.manifest.lineage["run"] == text
    registry.close()


def test_bombs_do_not_fill_the_memory() -> None:
    """In a process of its own, whose largest memory ever tells."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapters.siege_child"],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    grown_bytes = int(done.stdout)
    print(f"memory grew by {grown_bytes / 1e6:.1f} MB")
    assert grown_bytes < 48 << 20
