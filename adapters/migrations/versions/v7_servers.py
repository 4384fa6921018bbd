"""Which servers there are, and jobs that are one server's own. Those that have stories begin to be watched now."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from adapters.schema import UtcDateTime

revision = "7"
down_revision = "6"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("server", sa.String(32)))
    servers = op.create_table(
        "servers",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("seen_at", UtcDateTime, nullable=False),
    )
    told = op.get_bind().execute(sa.text("SELECT DISTINCT server FROM promotions")).scalars()
    op.bulk_insert(servers, [{"id": server, "seen_at": datetime.now(UTC)} for server in told])
