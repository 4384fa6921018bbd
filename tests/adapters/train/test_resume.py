import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConfigError, RunStopped
from adapters.train.cli import main
from adapters.train.config import TrainConfig, load_config
from adapters.train.journal import Step
from adapters.train.recipe import train
from adapters.train.run_directory import opened, run_path
from adapters.train.stop import StopRequest, listening

NOTHING_ASKED: dict[str, Any] = {"prompts": []}
RANDOM = {"r": 64, "lora_dropout": 0.3}
"""Random numbers are drawn in every step, so that a run that lost their state would end elsewhere; and matrices of
4,096 values, the smallest that an 8-bit optimizer keeps in 8 bits."""
RESULT = ("adapter_model.safetensors", "adapter_config.json", "loraplex.json")


def train_until(step: int, config: TrainConfig) -> None:
    """Somebody asks to stop while this step is taken."""
    request = StopRequest()

    def watch(taken: Step, total: int) -> None:
        if taken.step == step:
            request.by = "SIGTERM"

    train(config, watch, request)


def log(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "lion_8bit"])
def test_an_interrupted_run_ends_byte_for_byte_like_an_uninterrupted_one(
    write_yaml: Callable[..., Path], tmp_path: Path, optim: str
) -> None:
    path = write_yaml(peft=RANDOM, eval=NOTHING_ASKED, training={"optim": optim, "learning_rate": 1e-3})
    train(load_config(path))
    (tmp_path / "out").rename(tmp_path / "whole")
    config = load_config(path)
    with pytest.raises(RunStopped, match=r"stopped by SIGTERM after step 3 of 4.*resume"):
        train_until(3, config)
    assert not config.output.output_dir.exists()
    train(config)
    for name in RESULT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    assert not run_path(config.output.output_dir).exists()


@pytest.mark.parametrize(
    ("peft", "more"),
    [
        ({"method": "adalora", "lora_dropout": 0.3, "adalora": {"init_r": 4, "target_r": 2}}, {}),
        (
            {"init_lora_weights": "pissa", "r": 4, "lora_dropout": 0.3},
            {"quantization": {"load_in_4bit": False}, "model": {"dtype": "float32"}},
        ),
    ],
    ids=["adalora", "pissa"],
)
def test_so_does_one_with_a_state_of_its_own(
    write_yaml: Callable[..., Path], tmp_path: Path, peft: dict[str, Any], more: dict[str, Any]
) -> None:
    """AdaLoRA has taken half of its ranks away where it is stopped; PiSSA began with a part of the base."""
    training = {"max_steps": 10, "learning_rate": 1e-2}
    config = load_config(write_yaml(peft=peft, eval=NOTHING_ASKED, training=training, **more))
    train(config)
    (tmp_path / "out").rename(tmp_path / "whole")
    with pytest.raises(RunStopped):
        train_until(5, config)
    train(config)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert log(tmp_path / "out") == log(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over(write_yaml: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_yaml(eval=NOTHING_ASKED))
    with pytest.raises(RunStopped):
        train_until(3, config)
    kept = sorted((tmp_path / "out.run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000002", "step-00000003"]
    weights = kept[1] / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (kept[0].parent / "step-00000004").mkdir()
    with pytest.raises(RunStopped, match="after step 3"):
        train_until(3, config)


@pytest.fixture
def stopped(write_yaml: Callable[..., Path]) -> Path:
    path = write_yaml(eval=NOTHING_ASKED)
    with pytest.raises(RunStopped):
        train_until(2, load_config(path))
    return path


def test_a_changed_configuration_is_refused_and_says_what_differs(stopped: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.learning_rate: was 0\.01, is 0\.1\n.*output\.resume=never"):
        train(load_config(stopped, ["training.learning_rate=0.1"]))


def test_changed_data_is_refused(stopped: Path) -> None:
    rows = stopped.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("At dawn", "At noon"))
    with pytest.raises(ConfigError, match=r"data: was \w+, is \w+"):
        train(load_config(stopped))


def test_never_starts_anew(stopped: Path) -> None:
    changed = ["training.learning_rate=0.1", "output.resume=never", "training.max_steps=1"]
    assert [step.step for step in train(load_config(stopped, changed)).steps] == [1]


def test_a_second_run_into_the_same_directory_is_refused(config: TrainConfig) -> None:
    with opened(config, {}), pytest.raises(ConfigError, match="another run is writing there"):
        train(config)


@pytest.mark.parametrize("how", ["run.yaml", "out"])
def test_resume_takes_the_configuration_or_the_directory(
    stopped: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(stopped.parent / how)]) == 0
    assert [row["step"] for row in log(stopped.parent / "out") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("how", ["run.yaml", "out"])
def test_resume_of_nothing_exits_2(
    write_yaml: Callable[..., Path], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(write_yaml().parent / how)]) == 2
    assert "nothing to go on with" in " ".join(capsys.readouterr().err.split())


def test_a_signal_makes_a_checkpoint_and_exits_7(write_yaml: Callable[..., Path]) -> None:
    path = write_yaml(eval=NOTHING_ASKED, training={"max_steps": 100_000}, output={"save_steps": "never"})
    command = [sys.executable, "-m", "adapters.train", "run", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (lines := path.parent / "out.run" / "log.jsonl").exists() or '"loss"' not in lines.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        told = process.communicate()[1]
    assert process.returncode == 7
    assert "stopped by SIGTERM after step" in told
    assert f"loraplex train resume {path.parent / 'out'}" in " ".join(told.split())
    assert len(list((path.parent / "out.run" / "checkpoints").iterdir())) == 1


def test_ctrl_c_asks_once_and_the_second_time_does_not_wait() -> None:
    request, before = StopRequest(), signal.getsignal(signal.SIGINT)
    with listening(request):
        signal.raise_signal(signal.SIGINT)
        assert request.by == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_weights_with_the_lowest_held_out_loss_are_what_is_saved(
    write_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    """A rate this high makes things worse after the first steps."""
    wild = {"learning_rate": 0.3, "max_steps": 12, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    trained = train(load_config(write_yaml(eval=NOTHING_ASKED | {"eval_steps": 1}, training=wild)))
    looks = {row["step"]: row["held_out_loss"] for row in log(tmp_path / "out") if "held_out_loss" in row}
    base = looks.pop(0)
    best = min(looks, key=lambda step: looks[step])
    assert base == trained.verdict.held_out_base
    assert trained.verdict.held_out_adapter == looks[best]
    assert len(trained.steps) == best + 3 < 12  # three looks in a row found nothing better
    assert json.loads((tmp_path / "out" / "loraplex.json").read_text())["lineage"]["steps"] == best
