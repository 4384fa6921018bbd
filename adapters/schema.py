"""The registry's tables, in portable types. `migrations` makes them, step by step; this is what they lead to.

It does not know what the rows mean.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    false,
)

REVISION = "7"
"""The last step in `migrations/versions`."""


class UtcDateTime(TypeDecorator[datetime]):
    """SQLite forgets time zones, so times are stored in UTC without one and come back with it."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


metadata = MetaData()

identity = Table(
    "loraplex_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),  # for the first release, which had no steps
    # Which registry this is: the blob store remembers it, so that no other registry sweeps its blobs away.
    Column("identity", String(32), nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("description", Text),
    Column("created_at", UtcDateTime, nullable=False),
    # The row outlives the adapter: a number that was given out is never given out again.
    Column("last_number", Integer, nullable=False),
    Column("removed_at", UtcDateTime),
    # Counts every change of the adapter, its versions, aliases and tags: who changes it can say what they saw.
    Column("revision", Integer, nullable=False, server_default="0"),
)

versions = Table(
    "adapter_versions",
    metadata,
    Column("adapter", String(128), ForeignKey("adapters.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(71), nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("probe", JSON(none_as_null=True)),
    Column("pending", JSON(none_as_null=True)),
    # Of the manifest, where lists can look for them.
    Column("kind", String(32)),
    Column("base", String(256)),
    Index("ix_adapter_versions_adapter_state", "adapter", "state", "number"),
    Index("ix_adapter_versions_state", "state", "adapter", "number"),
    Index("ix_adapter_versions_kind", "kind", "adapter", "number"),
    Index("ix_adapter_versions_base", "base", "adapter", "number"),
)

# Of an adapter (number 0), or of one of its versions.
tags = Table(
    "adapter_tags",
    metadata,
    Column("adapter", String(128), ForeignKey("adapters.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("ix_adapter_tags_key_value", "key", "value", "adapter", "number"),
    Index("ix_adapter_tags_key", "key", "adapter", "number"),
)

alias_targets = Table(
    "adapter_alias_targets",
    metadata,
    Column("adapter", String(128), primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("weight", Integer, nullable=False),
    ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
)

# A copy of some of an alias's requests goes to this version too; its answer is compared and dropped.
alias_shadows = Table(
    "adapter_alias_shadows",
    metadata,
    Column("adapter", String(128), primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("percent", Integer, nullable=False),
    ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
)

# What was measured when the version was merged last. Beside its row, because lists need not carry it.
merge_reports = Table(
    "merge_reports",
    metadata,
    Column("adapter", String(128), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("summary", JSON, nullable=False),
    Column("report", JSON, nullable=False),
    ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
)

alias_moves = Table(
    "adapter_alias_moves",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter", String(128), ForeignKey("adapters.name"), nullable=False),
    Column("alias", String(128), nullable=False),
    Column("old_target", JSON, nullable=False),  # number → weight; empty: the alias was not there
    Column("new_target", JSON, nullable=False),
    Column("how", String(16), nullable=False),
    Column("moved_by", String(128)),
    Column("moved_at", UtcDateTime, nullable=False),
    Column("undone", Boolean, nullable=False),
    Index("ix_adapter_alias_moves_alias", "adapter", "alias"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("params", JSON, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("result", JSON),
    Column("error", JSON),
    Column("created_by", String(128)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("worker", String(128)),
    Column("beat_at", UtcDateTime),
    Column("attempts", Integer, nullable=False, default=0),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("pause_requested", Boolean, nullable=False, default=False, server_default=false()),
    Column("server", String(32)),
    Index("ix_jobs_state", "state"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job", String(32), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("at", UtcDateTime, nullable=False),
    Column("level", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON),
)

# Those that are up on this registry, or were.
servers = Table(
    "servers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("seen_at", UtcDateTime, nullable=False),
)

# Of an engine of merged weights. It outlives its version: what was learned of it is worth knowing.
promotions = Table(
    "promotions",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("server", String(32), nullable=False),
    Column("adapter", String(128), nullable=False),
    Column("number", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("job", String(32)),
    Column("figures", JSON, nullable=False),
    Column("events", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("switched_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Index("ix_promotions_state", "state"),
)
