"""The moves of every alias, so that one can be undone. From here on a release of before would not record them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    op.create_table(
        "adapter_alias_moves",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("adapter", sa.String(128), sa.ForeignKey("adapters.name"), nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("old_number", sa.Integer),
        sa.Column("new_number", sa.Integer),
        sa.Column("how", sa.String(16), nullable=False),
        sa.Column("moved_by", sa.String(128)),
        sa.Column("moved_at", sa.DateTime, nullable=False),
        sa.Column("undone", sa.Boolean, nullable=False),
    )
    op.create_index("ix_adapter_alias_moves_alias", "adapter_alias_moves", ["adapter", "alias"])
    op.execute("UPDATE loraplex_schema SET version = 2")  # the first release reads this, and refuses
