"""Promotions over HTTP: the story of each, and what is thought of the versions that are asked most. Needs `publish`: it
tells what others are asked.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter, Depends

from adapters.promotions import Promotion
from server.auth import require
from server.promotion_policy import Decision
from server.routes.answers import page
from server.routes.queries import PAGE, Limit, Word
from server.services import Wired

router = APIRouter(prefix="/v1/promotions", tags=["promotions"], dependencies=[Depends(require("publish"))])

# fmt: off
State = Literal[
    "advised", "building", "measuring", "serving",
    "demoted", "withdrawn", "refused", "failed", "cancelled", "rolled_back",
]
# fmt: on


@router.get("")
async def list_promotions(
    wired: Wired, after: Word = "", limit: Limit = PAGE, state: State | None = None, adapter: Word = None
) -> dict[str, Any]:
    """The newest first. `now`: what the last look thought of each version that has an engine or is asked by many."""
    stories = wired.promotions.promotions
    found = await asyncio.to_thread(stories, after=after or "", limit=limit + 1, state=state, adapter=adapter)
    told = page([promotion_json(story) for story in found[:limit]], "id", len(found) > limit)
    now = [decision_json(each) for each in wired.promoter.decisions]
    return told | {"promotion": wired.promoter.mode, "now": now}


@router.get("/{promotion_id}")
async def get_promotion(promotion_id: str, wired: Wired) -> dict[str, Any]:
    """With its events."""
    story = await asyncio.to_thread(wired.promotions.promotion, promotion_id)
    return promotion_json(story) | {"events": list(story.events)}


def promotion_json(story: Promotion) -> dict[str, Any]:
    return {
        "id": story.id,
        "object": "promotion",
        "adapter": story.adapter,
        "version": story.number,
        "state": story.state,
        "reason": story.reason,
        "origin": story.origin,
        "server": story.server,
        "job": story.job,
        "figures": dict(story.figures),
        "created_at": _seconds(story.created_at),
        "switched_at": _seconds(story.switched_at),
        "ended_at": _seconds(story.ended_at),
    }


def decision_json(decision: Decision) -> dict[str, Any]:
    adapter, _, number = decision.ref.partition("@")
    named = {"adapter": adapter, "version": int(number)}
    return {**named, "action": decision.action, "reason": decision.reason, "figures": dict(decision.figures)}


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
