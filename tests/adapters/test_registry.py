"""Versions are immutable and numbered once; aliases move; everything survives a restart."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from adapters.errors import Conflict, InvalidAdapter, NotFound, StoreError
from adapters.manifest import Manifest
from adapters.registry import Registry


def digest(character: str) -> str:
    return "sha256:" + character * 64


def manifest(character: str) -> Manifest:
    return Manifest(
        digest=digest(character),
        size_bytes=10,
        kind="lora",
        rank=8,
        alpha=16.0,
        target_modules=("q_proj",),
        module_count=2,
        parameter_count=128,
        dtype="BF16",
        base_model="tiny",
        files={"adapter_config.json": "00"},
        warnings=("something",),
        lineage={"seed": 7, "deep": {"list": [1, None]}},
        scores={"loss": 0.25},
    )


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    yield registry
    registry.close()


def test_first_version_is_number_one_and_the_default(registry: Registry) -> None:
    version, created = registry.add_version("a", manifest("1"), description="first", promote=False)
    assert created
    assert (version.ref, version.number, version.state, version.reason) == ("a@1", 1, "ready", None)
    assert version.manifest == manifest("1")
    assert datetime.now(UTC) - version.created_at < timedelta(minutes=1)
    assert registry.resolve("a") == version
    adapter = registry.adapter("a")
    assert (adapter.description, adapter.versions, adapter.aliases) == ("first", (version,), {"default": 1})


def test_everything_survives_a_restart(database_url: str) -> None:
    first = Registry(database_url)
    first.add_version("a", manifest("1"))
    first.set_alias("a", "stable", 1)
    before = first.adapters()
    first.close()
    second = Registry(database_url)
    assert second.adapters() == before
    assert [move.how for move in second.moves("a", "stable")] == ["set"]
    second.close()


def test_same_bytes_are_the_same_version(registry: Registry) -> None:
    first, _ = registry.add_version("a", manifest("1"))
    assert registry.add_version("a", manifest("1")) == (first, False)
    assert registry.add_version("b", manifest("1"))[0].ref == "b@1"
    assert registry.digests() == {digest("1")}


def test_same_bytes_are_a_new_version_while_the_old_one_drains(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.set_state("a", 1, "draining")
    version, created = registry.add_version("a", manifest("1"), promote=False)
    assert (created, version.number, registry.resolve("a").number) == (True, 2, 2)
    assert registry.resolve("a", digest("1")[:19]).number == 2
    registry.remove_version("a", 1)
    assert registry.resolve("a").number == 2


def test_promotion_is_a_choice(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.add_version("a", manifest("2"), promote=False)
    assert registry.resolve("a").number == 1
    assert registry.add_version("a", manifest("2"), promote=True)[1] is False
    assert registry.resolve("a").number == 2


def test_a_state_can_be_changed_only_from_another(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    assert registry.set_state("a", 1, "quarantined", "NaN logits", only_from="ready")
    assert not registry.set_state("a", 1, "quarantined", "again", only_from="ready")
    assert registry.resolve("a", "1").reason == "NaN logits"
    assert registry.set_state("a", 1, "draining")
    assert (registry.resolve("a", "1").state, registry.resolve("a", "1").reason) == ("draining", None)


def test_same_bytes_do_not_leave_quarantine_by_uploading_again(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.add_version("a", manifest("2"))
    registry.set_state("a", 1, "quarantined", "NaN logits")
    version, created = registry.add_version("a", manifest("1"), promote=True)
    assert (version.state, version.reason, created) == ("quarantined", "NaN logits", False)
    assert registry.resolve("a").number == 2


def test_numbers_are_never_used_again(registry: Registry) -> None:
    for character in "123":
        registry.add_version("a", manifest(character))
    registry.set_alias("a", "default", 1)
    registry.remove_version("a", 3)
    assert registry.add_version("a", manifest("4"))[0].number == 4
    for number in (1, 2, 4):
        registry.remove_version("a", number, with_aliases=True)
    assert registry.add_version("a", manifest("1"), description="again")[0].number == 5
    assert registry.adapter("a").description == "again"


@pytest.mark.parametrize(
    ("ref", "number"),
    [(None, 3), ("1", 1), ("007", None), ("latest", 2), ("stable", 1), (digest("2")[:19], 2), (digest("3"), 3)],
)
def test_references(registry: Registry, ref: str | None, number: int | None) -> None:
    for character in "123":
        registry.add_version("a", manifest(character))
    registry.set_alias("a", "stable", 1)
    registry.set_state("a", 3, "failed", "would not load")
    if number is None:
        with pytest.raises(NotFound):
            registry.resolve("a", ref)
    else:
        assert registry.resolve("a", ref).number == number


@pytest.mark.parametrize("ref", ["2", "0", "9" * 5000, "²", "", "sha256:111", "sha256:" + "9" * 12, "x\0y", "\ud800"])
def test_unknown_reference_says_what_exists(registry: Registry, ref: str) -> None:
    registry.add_version("a", manifest("1"))
    with pytest.raises(NotFound, match=r"versions: 1 \(ready\); aliases: default"):
        registry.resolve("a", ref)


@pytest.mark.parametrize("name", ["b", "", "A", "a@1", "x\0y", "\ud800", "../a", "n" * 5000])
def test_unknown_adapter_says_what_exists(registry: Registry, name: str) -> None:
    registry.add_version("a", manifest("1"))
    for call in (registry.resolve, registry.adapter, lambda name: registry.remove_version(name, 1)):
        with pytest.raises(NotFound, match="registered: a"):
            call(name)


def test_ambiguous_digest_asks_for_more(registry: Registry) -> None:
    for tail in "01":
        registry.add_version("a", Manifest(**{**manifest("1").to_json(), "digest": "sha256:" + "1" * 63 + tail}))
    with pytest.raises(NotFound, match="fits 2 versions; give more digits"):
        registry.resolve("a", "sha256:" + "1" * 20)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a@b", "a:b", "a/b", "a b", "ä", "a\n", "a" * 129])
def test_bad_adapter_names(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidAdapter) as error:
        registry.add_version(name, manifest("1"))
    assert error.value.code == "bad_name"
    assert registry.adapters() == []


@pytest.mark.parametrize("name", ["a", "0", "A.b-c_d", "a" * 128, "latest"])
def test_good_adapter_names(registry: Registry, name: str) -> None:
    assert registry.add_version(name, manifest("1"))[0].adapter == name


@pytest.mark.parametrize("alias", ["", "3", "٣", "latest", "sha256", "sha256x", "a@b", "a" * 129])
def test_bad_aliases(registry: Registry, alias: str) -> None:
    registry.add_version("a", manifest("1"))
    with pytest.raises(InvalidAdapter) as error:
        registry.set_alias("a", alias, 1)
    assert error.value.code == "bad_name"


@pytest.mark.parametrize("description", ["x" * 4001, "nul\0", "\ud800"])
def test_bad_descriptions(registry: Registry, description: str) -> None:
    with pytest.raises(InvalidAdapter) as error:
        registry.add_version("a", manifest("1"), description=description)
    assert error.value.code == "bad_description"


def test_aliases_move_and_go(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.add_version("a", manifest("2"))
    assert registry.set_alias("a", "stable", 1).aliases == {"default": 2, "stable": 1}
    assert registry.set_alias("a", "stable", 2).aliases == {"default": 2, "stable": 2}
    assert registry.remove_alias("a", "stable").aliases == {"default": 2}
    with pytest.raises(NotFound, match="'stable'"):
        registry.remove_alias("a", "stable")
    with pytest.raises(NotFound, match="'9'"):
        registry.set_alias("a", "stable", 9)
    with pytest.raises(Conflict, match="move it"):
        registry.remove_alias("a", "default")


def test_alias_moves_to_ready_versions_only(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.add_version("a", manifest("2"))
    registry.set_state("a", 1, "draining")
    with pytest.raises(Conflict, match="a@1 is draining"):
        registry.set_alias("a", "stable", 1)


def test_version_in_use_stays(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.add_version("a", manifest("2"))
    with pytest.raises(Conflict, match="alias default"):
        registry.remove_version("a", 2)
    registry.remove_version("a", 1)
    with pytest.raises(NotFound):
        registry.remove_version("a", 1)
    assert registry.digests() == {digest("2")}


def test_adapter_drained_version_by_version_is_gone_with_the_last(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.add_version("a", manifest("2"))
    for number in (1, 2):
        registry.set_state("a", number, "draining")
    for number in (2, 1):
        registry.remove_version("a", number, with_aliases=True)
    assert registry.adapters() == []
    assert registry.digests() == set()


def test_upload_while_the_whole_adapter_drains_outlives_it(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.set_alias("a", "stable", 1)
    registry.set_state("a", 1, "draining")
    registry.add_version("a", manifest("2"), promote=False)
    registry.remove_version("a", 1, with_aliases=True)
    assert registry.adapter("a").aliases == {"default": 2}


def test_concurrent_uploads_get_different_numbers(registry: Registry) -> None:
    characters = "0123456789abcdef"
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda c=c: numbers.append(registry.add_version("a", manifest(c))[0].number))
        for c in characters
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 17))


def test_sqlite_is_set_up_for_durability(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/r.db")
    with registry._database.read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "busy_timeout": 10_000}


def test_database_that_cannot_be_opened_says_which(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to look like one" * 100)
    for name in ("gone/r.db", "text.db"):
        with pytest.raises(StoreError, match=f"{name} cannot be opened: .*check that"):
            Registry(f"sqlite:///{tmp_path}/{name}")


def moved(registry: Registry, alias: str = "default") -> list[tuple[Any, Any, str, bool]]:
    """An end with one version is shown as its number, one with none as None."""

    def end(target: Mapping[int, int]) -> Any:
        return dict(target) if len(target) > 1 else next(iter(target), None)

    return [(end(move.old), end(move.new), move.how, move.undone) for move in registry.moves("a", alias)]


def test_every_move_of_an_alias_is_on_record(registry: Registry) -> None:
    registry.add_version("a", manifest("1"), by="trainer")
    registry.add_version("a", manifest("2"))
    registry.set_alias("a", "default", 1, by="me")
    registry.set_alias("a", "default", 1)  # points there already
    registry.set_alias("a", "stable", 1)
    registry.remove_alias("a", "stable", by="me")
    assert moved(registry) == [(2, 1, "set", False), (1, 2, "upload", False), (None, 1, "upload", False)]
    assert moved(registry, "stable") == [(1, None, "remove", False), (None, 1, "set", False)]
    assert [move.by for move in registry.moves("a", "default")] == ["me", None, "trainer"]
    assert datetime.now(UTC) - registry.moves("a", "default")[0].at < timedelta(minutes=1)
    with pytest.raises(NotFound, match="'blue'"):
        registry.moves("a", "blue")


def test_a_rollback_undoes_the_last_move_and_the_next_one_the_move_before(registry: Registry) -> None:
    for character in "123":
        registry.add_version("a", manifest(character))
    assert registry.rollback("a", by="me").aliases == {"default": 2}
    assert registry.rollback("a").aliases == {"default": 1}
    with pytest.raises(Conflict, match="no earlier target"):
        registry.rollback("a")
    registry.set_alias("a", "default", 3)
    assert registry.rollback("a").aliases == {"default": 1}
    assert moved(registry)[:3] == [(3, 1, "rollback", False), (1, 3, "set", True), (2, 1, "rollback", False)]
    assert registry.moves("a", "default")[-1].by is None
    with pytest.raises(NotFound, match="'blue'"):
        registry.rollback("a", "blue")


def test_a_rollback_of_one_alias_leaves_the_others(registry: Registry) -> None:
    for character in "12":
        registry.add_version("a", manifest(character))
    registry.set_alias("a", "stable", 1)
    registry.set_alias("a", "stable", 2)
    assert registry.rollback("a", "stable").aliases == {"default": 2, "stable": 1}
    with pytest.raises(Conflict, match="no earlier target"):  # it was made there, so there is nothing before
        registry.rollback("a", "stable")


@pytest.mark.parametrize("state", ["deleted", "quarantined", "draining"])
def test_no_rollback_to_what_cannot_serve(registry: Registry, state: str) -> None:
    for character in "123":
        registry.add_version("a", manifest(character))
    if state == "deleted":
        registry.remove_version("a", 2)
    else:
        registry.set_state("a", 2, state)
    with pytest.raises(Conflict, match=f"version 2, which is {state}; .* ready: 1, 3"):
        registry.rollback("a")
    assert registry.resolve("a").number == 3


def test_an_alias_that_went_with_its_version_is_on_record(registry: Registry) -> None:
    registry.add_version("a", manifest("1"))
    registry.add_version("a", manifest("2"))
    registry.set_alias("a", "blue", 1)
    registry.remove_version("a", 1, with_aliases=True)
    assert moved(registry, "blue") == [(1, None, "delete", False), (None, 1, "set", False)]


def test_a_hundred_moves_are_kept(registry: Registry) -> None:
    for character in "12":
        registry.add_version("a", manifest(character))
    for number in [1, 2] * 51:
        registry.set_alias("a", "default", number)
    assert len(moved(registry)) == 100
    assert {how for _, _, how, _ in moved(registry)} == {"set"}


def test_rollbacks_at_the_same_time_each_undo_a_move(registry: Registry) -> None:
    for character in "0123456789":
        registry.add_version("a", manifest(character))
    threads = [threading.Thread(target=registry.rollback, args=("a",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.resolve("a").number == 6


@pytest.fixture
def three(registry: Registry) -> Registry:
    """`a` with three versions, the default alias at the last."""
    for character in "123":
        registry.add_version("a", manifest(character))
    return registry


def test_a_split_shares_traffic_by_weight(three: Registry) -> None:
    adapter = three.set_alias("a", "default", {1: 1, 2: 3})
    assert (adapter.aliases, adapter.splits) == ({"default": 2}, {"default": {1: 1, 2: 3}})
    assert (adapter.aliases_of(1), adapter.aliases_of(3)) == (["default"], [])
    got = Counter(three.resolve("a", sticky=f"user-{number}").number for number in range(400))
    assert got[1] + got[2] == 400
    assert 60 < got[1] < 140  # 100 expected, a standard deviation is 9
    assert {three.resolve("a").number for _ in range(60)} == {1, 2}


def test_a_user_of_a_split_keeps_the_version(three: Registry) -> None:
    three.set_alias("a", "default", {1: 90, 2: 10})
    users = [f"user-{number}" for number in range(300)]
    before = {user: three.resolve("a", sticky=user).number for user in users}
    assert {user: three.resolve("a", "default", sticky=user).number for user in users} == before
    three.set_alias("a", "default", {1: 60, 2: 40})
    after = {user: three.resolve("a", sticky=user).number for user in users}
    assert [user for user in users if before[user] == 2 and after[user] != 2] == []
    assert sum(after[user] == 2 for user in users) > sum(before[user] == 2 for user in users)


def test_what_is_not_ready_gets_none_of_a_split(three: Registry) -> None:
    three.set_alias("a", "default", {1: 50, 2: 50})
    three.set_state("a", 2, "quarantined", "NaN logits")
    assert {three.resolve("a", sticky=str(number)).number for number in range(40)} == {1}
    three.set_state("a", 1, "quarantined", "NaN logits")
    assert three.resolve("a").state == "quarantined"


def test_a_split_rolls_back_and_is_on_record(three: Registry) -> None:
    three.set_alias("a", "default", {2: 90, 3: 10}, by="me")
    three.set_alias("a", "default", 3)
    assert three.rollback("a").splits == {"default": {2: 90, 3: 10}}
    assert three.rollback("a").targets == {"default": {3: 1}}
    assert moved(three)[:4] == [
        ({2: 90, 3: 10}, 3, "rollback", False),
        (3, {2: 90, 3: 10}, "rollback", False),
        ({2: 90, 3: 10}, 3, "set", True),
        (3, {2: 90, 3: 10}, "set", True),
    ]


def test_a_version_in_a_split_is_in_use_and_leaves_its_part_to_the_others(three: Registry) -> None:
    three.set_alias("a", "default", {1: 90, 2: 10})
    with pytest.raises(Conflict, match="alias default"):
        three.remove_version("a", 2)
    three.remove_version("a", 2, with_aliases=True)
    assert three.adapter("a").targets == {"default": {1: 1}}
    assert moved(three)[0] == ({1: 90, 2: 10}, 1, "delete", False)


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ({}, "names 0 versions"),
        (dict.fromkeys(range(1, 10), 1), "names 9 versions"),
        ({1: 0, 2: 1}, "version 1 has the weight 0, .* leave it out"),
        ({1: -1, 2: 1}, "weight -1"),
        ({1: 1, 2: 10**9}, "weight 1000000000"),
    ],
)
def test_a_split_that_cannot_be(three: Registry, target: dict[int, int], complaint: str) -> None:
    with pytest.raises(InvalidAdapter, match=complaint) as error:
        three.set_alias("a", "default", target)
    assert error.value.code == "bad_split"
    assert three.adapter("a").targets == {"default": {3: 1}}


def test_a_split_needs_versions_that_are_ready(three: Registry) -> None:
    three.set_state("a", 2, "draining")
    with pytest.raises(Conflict, match="a@2 is draining"):
        three.set_alias("a", "default", {1: 1, 2: 1})
    with pytest.raises(NotFound, match="'9'"):
        three.set_alias("a", "default", {1: 1, 9: 1})


@pytest.mark.parametrize("ref", [None, "2", "latest", "stable", digest("2"), digest("2")[:19]])
def test_a_reference_reads_no_more_versions_than_it_means(
    three: Registry, ref: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: 10,000 versions are resolved as fast as ten."""
    three.set_alias("a", "stable", {1: 1, 2: 1})
    read: list[int] = []
    made = Manifest.from_json

    def count(data: Mapping[str, Any]) -> Manifest:
        read.append(1)
        return made(data)

    monkeypatch.setattr(Manifest, "from_json", count)
    three.resolve("a", ref)
    assert len(read) == (2 if ref == "stable" else 1)


def test_adapters_page_by_page(registry: Registry) -> None:
    for name in ("b", "a", "d", "c"):
        registry.add_version(name, manifest("1"))
        registry.add_version(name, manifest("2"))
    registry.remove_version("c", 1)
    registry.remove_version("c", 2, with_aliases=True)
    pages = [registry.adapters(limit=2), registry.adapters(after="b", limit=2), registry.adapters(after="d")]
    assert [[adapter.name for adapter in page] for page in pages] == [["a", "b"], ["d"], []]
    assert registry.adapters() == [*pages[0], *pages[1]]
    assert pages[1] == [registry.adapter("d")]


def test_what_is_being_deleted(three: Registry) -> None:
    three.set_state("a", 2, "draining")
    assert three.draining() == [three.resolve("a", "2")]


def test_an_unknown_name_among_many_is_answered_briefly(registry: Registry) -> None:
    for number in range(20):
        registry.add_version(f"a{number:02}", manifest("1"))
    with pytest.raises(NotFound, match=r"registered: a00, .*, a07 and 12 more$"):
        registry.resolve("b")


@pytest.fixture
def two(database_url: str) -> Iterator[tuple[Registry, Registry]]:
    """The same database, opened twice."""
    first, second = Registry(database_url), Registry(database_url)
    yield first, second
    first.close()
    second.close()


def test_while_a_server_is_up_nobody_is_alone_with_the_registry(two: tuple[Registry, Registry]) -> None:
    first, second = two
    for _ in range(2):
        with first.serving(), second.serving():
            with pytest.raises(Conflict, match="a server is up"):
                with second.unserved():
                    raise AssertionError
    with pytest.raises(KeyError):
        with first.unserved():
            raise KeyError
    with second.unserved():
        pass


def test_a_server_that_has_ended_is_gone_before_its_connection_is(postgres: Callable[[], str]) -> None:
    """PostgreSQL notices the end of a connection a moment later: whoever came in that moment was told of a server."""
    url = postgres()
    ended, next_one = Registry(url), Registry(url)
    seen: list[str] = []

    def connection_ends(*_: object) -> None:
        with next_one.unserved():
            seen.append("alone")

    with ended.serving():
        event.listen(ended._database._engine, "invalidate", connection_ends)
    assert seen == ["alone"]
    ended.close()
    next_one.close()


def test_a_server_waits_until_whoever_is_alone_has_done(two: tuple[Registry, Registry]) -> None:
    order: list[str] = []

    def serve() -> None:
        with two[1].serving():
            order.append("served")

    serving = threading.Thread(target=serve)
    with two[0].unserved():
        serving.start()
        serving.join(0.2)
        order.append("done")
    serving.join()
    assert order == ["done", "served"]


def test_of_all_who_make_files_and_rows_agree_one_goes_at_a_time(two: tuple[Registry, Registry]) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(registry: Registry) -> None:
        for _ in range(5):
            with registry.alone():
                inside.append(1)
                most.append(len(inside))
                registry.adapters()  # needs a connection of its own
                inside.pop()

    threads = [threading.Thread(target=work, args=(registry,)) for registry in (*two, *two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20


def test_an_adapter_drains_as_a_whole_or_not_at_all(registry: Registry) -> None:
    for character in "123":
        registry.add_version("a", manifest(character))
    with pytest.raises(Conflict, match="alias default serves") as error:
        registry.drain("a", 3)
    assert error.value.code == "version_in_use"
    assert [version.number for version in registry.drain("a", 1)] == [1]
    assert [version.state for version in registry.adapter("a").versions] == ["draining", "ready", "ready"]
    assert [version.number for version in registry.drain("a")] == [1, 2, 3]
    assert {version.state for version in registry.adapter("a").versions} == {"draining"}
    with pytest.raises(NotFound):
        registry.drain("b")
