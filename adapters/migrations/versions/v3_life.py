"""Tags, shadows, what the probe found of a version, what lists look for, and jobs with their events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    op.add_column("adapters", sa.Column("revision", sa.Integer, nullable=False, server_default="0"))
    op.add_column("adapter_versions", sa.Column("probe", sa.JSON))
    op.add_column("adapter_versions", sa.Column("pending", sa.JSON))
    _fill_in_what_lists_look_for()
    op.create_table(
        "adapter_tags",
        sa.Column("adapter", sa.String(128), sa.ForeignKey("adapters.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(256), nullable=False),
    )
    op.create_index("ix_adapter_tags_key_value", "adapter_tags", ["key", "value", "adapter", "number"])
    op.create_index("ix_adapter_tags_key", "adapter_tags", ["key", "adapter", "number"])
    op.create_table(
        "adapter_alias_shadows",
        sa.Column("adapter", sa.String(128), primary_key=True),
        sa.Column("alias", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("percent", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("params", sa.JSON, nullable=False),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("created_by", sa.String(128)),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("started_at", sa.DateTime),
        sa.Column("ended_at", sa.DateTime),
        sa.Column("worker", sa.String(128)),
        sa.Column("beat_at", sa.DateTime),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
    )
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_table(
        "job_events",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("at", sa.DateTime, nullable=False),
        sa.Column("level", sa.String(16), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.JSON),
    )
    op.create_index("ix_job_events_job", "job_events", ["job"])


def _fill_in_what_lists_look_for() -> None:
    table = "adapter_versions"
    op.add_column(table, sa.Column("kind", sa.String(32)))
    op.add_column(table, sa.Column("base", sa.String(256)))
    manifest = sa.column("manifest", sa.JSON)
    versions = sa.table(table, manifest, sa.column("kind"), sa.column("base"))
    kind, base = manifest["kind"].as_string(), manifest["base_model"].as_string()
    op.execute(versions.update().values(kind=sa.func.substr(kind, 1, 32), base=sa.func.substr(base, 1, 256)))
    op.create_index("ix_adapter_versions_adapter_state", table, ["adapter", "state", "number"])
    for column in ("state", "kind", "base"):
        op.create_index(f"ix_adapter_versions_{column}", table, [column, "adapter", "number"])
