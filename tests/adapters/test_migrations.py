"""A database of any older release becomes today's, with what was in it; one of a newer release is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, inspect, text

from adapters import migrations, schema
from adapters.errors import StoreError
from adapters.promotions import SERVING, Promotions
from adapters.registry import Registry
from adapters.servers import Servers
from tests.adapters.test_registry import manifest

FIRST_RELEASE = """
CREATE TABLE loraplex_schema (version INTEGER NOT NULL, identity VARCHAR(32) NOT NULL, PRIMARY KEY (version));
CREATE TABLE adapters (name VARCHAR(128) NOT NULL, description TEXT, created_at {time} NOT NULL,
  last_number INTEGER NOT NULL, removed_at {time}, PRIMARY KEY (name));
CREATE TABLE adapter_versions (adapter VARCHAR(128) NOT NULL, number INTEGER NOT NULL, digest VARCHAR(71) NOT NULL,
  state VARCHAR(16) NOT NULL, reason TEXT, created_at {time} NOT NULL, manifest JSON NOT NULL,
  PRIMARY KEY (adapter, number), FOREIGN KEY(adapter) REFERENCES adapters (name));
CREATE INDEX ix_adapter_versions_digest ON adapter_versions (digest);
CREATE TABLE adapter_aliases (adapter VARCHAR(128) NOT NULL, alias VARCHAR(128) NOT NULL, number INTEGER NOT NULL,
  PRIMARY KEY (adapter, alias),
  FOREIGN KEY(adapter, number) REFERENCES adapter_versions (adapter, number));
INSERT INTO loraplex_schema VALUES (1, '0123456789abcdef0123456789abcdef');
INSERT INTO adapters VALUES ('a', 'the first', '2026-11-21 10:00:00', 7, NULL);
INSERT INTO adapter_versions VALUES
  ('a', 7, '{digest}', 'quarantined', 'NaN logits', '2026-11-21 10:00:01', '{manifest}');
INSERT INTO adapter_aliases VALUES ('a', 'default', 7);
"""
"""What loraplex 0.1.0 wrote on 2026-11-21, with one adapter."""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def as_first_released(engine: Engine) -> None:
    time = "TIMESTAMP WITHOUT TIME ZONE" if engine.dialect.name == "postgresql" else "DATETIME"
    stored = manifest("1")
    script = FIRST_RELEASE.format(time=time, digest=stored.digest, manifest=json.dumps(stored.to_json()))
    with engine.begin() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)


def differences(connection: Connection) -> list[Any]:
    return list(compare_metadata(MigrationContext.configure(connection), schema.metadata))


def test_the_steps_lead_to_the_tables_that_the_code_uses(engine: Engine) -> None:
    Registry(url_of(engine)).close()
    with engine.begin() as connection:
        assert differences(connection) == []
        assert migrations.current(connection) == schema.REVISION


def test_a_database_of_the_first_release_keeps_what_it_holds(engine: Engine) -> None:
    as_first_released(engine)
    registry = Registry(url_of(engine))
    assert registry.identity == "0123456789abcdef0123456789abcdef"
    (adapter,) = registry.adapters()
    (version,) = adapter.versions
    assert (adapter.description, adapter.aliases, version.reason) == ("the first", {"default": 7}, "NaN logits")
    assert version.manifest == manifest("1")
    assert registry.add_version("a", manifest("2"))[0].number == 8
    assert [move.old for move in registry.moves("a", "default")] == [{7: 1}]
    registry.close()
    with engine.begin() as connection:
        assert differences(connection) == []
        assert connection.scalar(text("SELECT version FROM loraplex_schema")) == 2


def test_servers_that_were_there_before_any_was_watched_begin_to_be(engine: Engine) -> None:
    registry = Registry(url_of(engine))
    Promotions(registry.database, "there").begin("a", 1, SERVING, "asked by many")
    registry.close()
    with engine.begin() as connection:
        for statement in (
            "DROP TABLE servers",
            "ALTER TABLE jobs DROP COLUMN server",
            "UPDATE alembic_version SET version_num = '6'",
        ):
            connection.exec_driver_sql(statement)
    registry = Registry(url_of(engine))
    here = Servers(registry.database, "here")
    assert (here.lost(3600), here.lost(-3600)) == ([], ["there"])
    registry.close()


def test_a_step_that_fails_leaves_the_database_as_it_was(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    as_first_released(engine)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr("alembic.op.create_index", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        Registry(url_of(engine))
    assert sorted(inspect(engine).get_table_names()) == [
        "adapter_aliases",
        "adapter_versions",
        "adapters",
        "loraplex_schema",
    ]
    monkeypatch.undo()
    registry = Registry(url_of(engine))
    assert registry.adapter("a").aliases == {"default": 7}
    registry.close()


def test_a_newer_database_is_refused(engine: Engine) -> None:
    Registry(url_of(engine)).close()
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '99'")
    with pytest.raises(StoreError, match=re.escape("has schema 99, this loraplex knows")) as error:
        Registry(url_of(engine))
    assert error.value.code == "schema_mismatch"


def open_and_close(url: str) -> str:
    registry = Registry(url)
    identity = registry.identity
    registry.close()
    return identity


def test_processes_that_start_together_make_one_schema(engine: Engine) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        assert len(set(pool.map(open_and_close, [url_of(engine)] * 4))) == 1
