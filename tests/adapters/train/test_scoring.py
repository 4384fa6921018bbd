import pytest

from adapters.train.scoring import score

WANT = '{"category": "billing", "order": "A-1", "urgent": true}'


def test_text_is_compared_without_the_white_space_around_it() -> None:
    found = score(["yes", "no"], [" yes\n", "No"])
    assert (found.rows, found.exact) == (2, 0.5)
    assert (found.valid_json, found.json_match, found.fields) == (None, None, None)


def test_json_in_another_order_is_the_same_json_but_no_exact_match() -> None:
    found = score([WANT], ['{"urgent":true,"order":"A-1","category":"billing"}'])
    assert (found.exact, found.valid_json, found.json_match) == (0.0, 1.0, 1.0)
    assert found.fields == {"category": 1.0, "order": 1.0, "urgent": 1.0}


def test_each_field_is_counted_on_its_own() -> None:
    found = score([WANT, WANT], ['{"category": "billing", "order": null, "urgent": 1}', "billing, urgent"])
    assert (found.valid_json, found.json_match) == (0.5, 0.0)
    assert found.fields == {"category": 0.5, "order": 0.0, "urgent": 0.0}  # 1 is not true


def test_a_key_that_is_missing_is_not_null() -> None:
    found = score(['{"order": null}', '{"order": null}'], ['{"order": null}', "{}"])
    assert found.fields == {"order": 0.5}


def test_a_field_counts_only_where_it_is_expected() -> None:
    found = score(['{"a": 1}', '{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}', '{"a": 1, "b": 2}'])
    assert found.fields == {"a": 1.0, "b": 1.0}
    assert found.json_match == 0.5


@pytest.mark.parametrize("answer", ["NaN", "", "{", '{"a": NaN}', "[" * 100_000, '{"a": 1} and more'])
def test_what_is_no_json_is_not_valid(answer: str) -> None:
    assert score(['{"a": 1}'], [answer]).valid_json == 0.0


@pytest.mark.parametrize(
    "answer", ["```json\n{}\n```", "Here it is:\n\n```\n  {}\n```\nAnything else?", "  ```JSON\n{}\n  ```  "]
)
def test_json_in_a_code_fence_counts_but_is_not_valid_as_it_stands(answer: str) -> None:
    found = score([WANT], [answer.replace("{}", WANT)])
    assert (found.exact, found.valid_json, found.json_match) == (0.0, 0.0, 1.0)
    assert found.fields == {"category": 1.0, "order": 1.0, "urgent": 1.0}


@pytest.mark.parametrize(
    "answer", ["```\n{}\n```\nor\n```\n{}\n```", "```json\n{}", "It is {}.", "```\n{} and more\n```", "```{}```"]
)
def test_json_that_nobody_could_pick_out_without_guessing_does_not_count(answer: str) -> None:
    assert score([WANT], [answer.replace("{}", WANT)]).json_match == 0.0


def test_a_fence_inside_a_value_is_no_fence() -> None:
    text = '{"code": "```\\nx\\n```"}'
    found = score([text], [text])
    assert (found.valid_json, found.json_match) == (1.0, 1.0)
