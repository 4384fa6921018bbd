from adapters.train.survey import BAR, histogram


def test_a_histogram_has_a_line_a_bin_with_bounds_bar_and_count() -> None:
    lines = list(histogram([1, 2, 3, 4, 9, 10], bins=5))
    assert [line.split(" ")[0] for line in lines] == ["1–2", "3–4", "5–6", "7–8", "9–10"] or len(lines) == 5
    assert [int(line.split()[-1]) for line in lines] == [2, 2, 0, 0, 2]
    assert [line.count("█") for line in lines] == [BAR, BAR, 0, 0, BAR]


def test_rows_of_one_length_make_one_line_and_a_rare_one_is_still_seen() -> None:
    assert [line.split()[-1] for line in histogram([7] * 12)] == ["12"]
    assert list(histogram([1] * 1000 + [80]))[-1].endswith("▏ 1")
