"""An alias may point to several versions, with weights; and its moves are recorded, so that one can be undone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    op.create_table(
        "adapter_alias_targets",
        sa.Column("adapter", sa.String(128), primary_key=True),
        sa.Column("alias", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
    )
    op.execute("INSERT INTO adapter_alias_targets SELECT adapter, alias, number, 1 FROM adapter_aliases")
    op.drop_table("adapter_aliases")
    op.create_table(
        "adapter_alias_moves",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("adapter", sa.String(128), sa.ForeignKey("adapters.name"), nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("old_target", sa.JSON, nullable=False),
        sa.Column("new_target", sa.JSON, nullable=False),
        sa.Column("how", sa.String(16), nullable=False),
        sa.Column("moved_by", sa.String(128)),
        sa.Column("moved_at", sa.DateTime, nullable=False),
        sa.Column("undone", sa.Boolean, nullable=False),
    )
    op.create_index("ix_adapter_alias_moves_alias", "adapter_alias_moves", ["adapter", "alias"])
    op.execute("UPDATE loraplex_schema SET version = 2")  # the first release reads this, and refuses
