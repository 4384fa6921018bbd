"""Run by Alembic, which looks for this file: the steps go through the connection that `upgrade` was given."""

from alembic import context

from adapters import schema

context.configure(connection=context.config.attributes["connection"], target_metadata=schema.metadata)
with context.begin_transaction():
    context.run_migrations()
