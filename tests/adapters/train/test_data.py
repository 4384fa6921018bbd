import pytest

from adapters.errors import DataError
from adapters.train.data import Conversation, digest_of, split_by_hash, without_copies


def conversation(text: str, place: str = "x:1") -> Conversation:
    return Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": "yes"}), place)


def test_the_split_depends_on_content_and_not_on_order() -> None:
    rows = [conversation(f"question {i}") for i in range(20)]
    one, other = split_by_hash(rows, 0.25), split_by_hash(rows[::-1], 0.25)
    assert (len(one.train), len(one.held_out)) == (15, 5)
    assert one.held_out == other.held_out
    assert digest_of(rows) == digest_of(rows[::-1]) != digest_of(rows[1:])


def test_a_copy_never_leaks_into_the_held_out_set() -> None:
    rows = [conversation(f"question {i % 5}", f"x:{i}") for i in range(20)]
    split = split_by_hash(rows, 0.4)
    assert split.duplicates == 15
    assert not {c.digest for c in split.train} & {c.digest for c in split.held_out}


def test_near_copies_stay_on_one_side_of_the_split() -> None:
    words = ("Where is it", "WHERE is it?!", " where  is\tit ")
    rows = [conversation(f"{text} {i}") for i in range(8) for text in words]
    split = split_by_hash(rows, 0.4)
    assert split.duplicates == 0
    assert len({c.digest for c in split.train}) + len({c.digest for c in split.held_out}) == 24
    assert not {c.gist for c in split.train} & {c.gist for c in split.held_out}


def test_conversations_without_a_letter_are_not_all_near_copies() -> None:
    rows = [Conversation(({"role": "text", "content": text},), "x:1") for text in ("?!", "…", "😀")]
    assert len({row.gist for row in rows}) == 3


def test_a_copy_says_where_the_first_stands() -> None:
    rows = [conversation("a", "x:1"), conversation("b", "x:2"), conversation("a", "y:7")]
    kept, copies = without_copies(rows)
    assert [row.place for row in kept] == ["x:1", "x:2"]
    assert copies == ("y:7 is x:1 again",)


def test_one_conversation_in_two_spellings_cannot_be_split() -> None:
    with pytest.raises(DataError, match="x:1: 2 different conversations are needed"):
        split_by_hash([conversation("a"), conversation("A!", "x:2")], 0.5)
