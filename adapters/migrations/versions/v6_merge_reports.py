"""What was measured of a version when it was merged."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adapters.schema import UtcDateTime

revision = "6"
down_revision = "5"


def upgrade() -> None:
    op.create_table(
        "merge_reports",
        sa.Column("adapter", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", UtcDateTime, nullable=False),
        sa.Column("summary", sa.JSON, nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        sa.ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
    )
