"""Adapters, their versions, aliases; and which registry this is. What the first release made by itself."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    identity = op.create_table(
        "loraplex_schema",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("identity", sa.String(32), nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("description", sa.Text),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("last_number", sa.Integer, nullable=False),
        sa.Column("removed_at", sa.DateTime),
    )
    op.create_table(
        "adapter_versions",
        sa.Column("adapter", sa.String(128), sa.ForeignKey("adapters.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
    )
    op.create_index("ix_adapter_versions_digest", "adapter_versions", ["digest"])
    op.create_table(
        "adapter_aliases",
        sa.Column("adapter", sa.String(128), primary_key=True),
        sa.Column("alias", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
    )
    op.bulk_insert(identity, [{"version": 1, "identity": uuid.uuid4().hex}])
