"""The rows that an adapter was not trained on, kept beside it, so that what becomes of it can be measured later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.train.data import Conversation

ROWS = 200
"""At most; a report reads a few thousand tokens."""


def write_held_out(conversations: Sequence[Conversation], path: Path) -> None:
    """Of several formats only the first row's: a file has one."""
    rows = [_row(conversation) for conversation in conversations]
    alike = [row for row in rows if row.keys() == rows[0].keys()][:ROWS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in alike), encoding="utf-8")


def _row(conversation: Conversation) -> Mapping[str, Any]:
    if not conversation.raw:
        return {"messages": conversation.messages}
    return {message["role"]: message["content"] for message in conversation.messages}
