"""The model card that is made where none came with the files."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from adapters.card import generated
from adapters.records import About, Version
from tests.adapters.test_registry import manifest

ABOUT = About(["default"], {"team": "search"}, {}, 1)


def version(**changes: object) -> Version:
    record = Version("a", 3, manifest("1").digest, "ready", None, datetime(2026, 11, 21, tzinfo=UTC), manifest("1"))
    return replace(record, **changes)  # type: ignore[arg-type]


def test_it_tells_what_is_known() -> None:
    text = generated(version(), ABOUT)
    assert text.startswith("# a@3\n\nAn adapter for `tiny`: served as it came.\n")
    for line in (
        "| `kind` | `lora, rank 8, alpha 16, BF16` |",
        "| `aliases` | `default` |",
        "| `team` | `search` |",
        "| `loss` | `0.25` |",
        '| `deep` | `{"list": [1, null]}` |',
        "- `something`",
    ):
        assert f"\n{line}\n" in text
    assert "Probe" not in text


def test_it_says_why_a_version_is_out_of_service() -> None:
    assert "| `state` | `quarantined: NaN logits` |" in generated(
        version(state="quarantined", reason="NaN logits"), ABOUT
    )


def test_nothing_in_it_becomes_markup() -> None:
    wicked = "x` | <script>\n\n# y"
    text = generated(version(manifest=replace(manifest("1"), base_model=wicked, lineage={wicked: wicked})), ABOUT)
    assert "for `x' ¦ <script> # y`:" in text
    assert "\n| `x' ¦ <script> # y` | `x' ¦ <script> # y` |\n" in text
