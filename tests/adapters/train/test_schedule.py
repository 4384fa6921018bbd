import math

import pytest

from adapters.train.schedule import due, learning_rate, total_steps
from adapters.train.sections import TrainingSection


def rates(total: int = 10, **keys: object) -> list[float]:
    section = TrainingSection.model_validate({"learning_rate": 1.0, **keys})
    return [learning_rate(step, section, total) for step in range(1, total + 1)]


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    found = rates(warmup_steps=2)
    assert found[:2] == [0.5, 1.0]
    assert found[1:] == sorted(found[1:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


def test_a_cosine_is_at_its_middle_halfway() -> None:
    assert rates(warmup_steps=0)[4] == pytest.approx(0.55)


def test_a_line_falls_by_the_same_every_step() -> None:
    found = rates(warmup_steps=0, lr_scheduler_type="linear")
    assert found == pytest.approx([0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19, 0.1])


def test_a_constant_rate_rises_and_stays() -> None:
    assert rates(warmup_steps=2, lr_scheduler_type="constant") == [0.5] + 9 * [1.0]


def test_a_warmup_below_one_is_a_share_of_the_run() -> None:
    assert rates(total=100, warmup_steps=0.03)[:3] == pytest.approx([1 / 3, 2 / 3, 1])


def test_epochs_become_steps_and_a_part_of_a_step_is_one() -> None:
    section = TrainingSection(num_train_epochs=2.5, gradient_accumulation_steps=4)
    assert total_steps(section, batches_per_epoch=10) == math.ceil(25 / 4) == 7
    assert total_steps(section.model_copy(update={"max_steps": 3}), batches_per_epoch=10) == 3


@pytest.mark.parametrize(("total", "times"), [(4, 4), (24, 4), (100, 4), (250, 10), (1000, 20), (50_000, 20)])
def test_auto_is_4_to_20_times(total: int, times: int) -> None:
    found = [step for step in range(1, total + 1) if due(step, "auto", total)]
    assert len(found) == times
    assert found[-1] == total


def test_every_so_many_steps_and_at_the_last() -> None:
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert not any(due(step, "never", 10) for step in range(1, 11))
