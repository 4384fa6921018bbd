"""Fine-tuning jobs with a stand-in for the training process: created, followed, paused, cancelled, killed, refused."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server import fine_tuning
from tests.server.conftest import wait_until_ready
from tests.server.harness import PATIENCE_S, World, chat, said, until_let_go, upload, world
from tests.server.test_data_files_routes import ROW, send

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tuning, "WORKER", "tests.server.stand_in_trainer")


@pytest.fixture
def control(built: World) -> Callable[..., None]:
    """Makes files that the stand-in looks for."""
    directory = built.settings.data_dir / "control"
    directory.mkdir()

    def make(*names: str, text: str = "") -> None:
        for name in names:
            (directory / name).write_text(text)

    return make


@pytest.fixture
def file_id(client: TestClient) -> str:
    return str(send(client, ROW * 40).json()["id"])


def create(client: TestClient, file_id: str, **fields: Any) -> Any:
    return client.post(JOBS, json={"model": "tiny", "training_file": file_id, **fields})


def until(client: TestClient, job_id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while not reached(job := client.get(f"{JOBS}/{job_id}").json()):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return dict(job)


def end_of(client: TestClient, job_id: str) -> dict[str, Any]:
    job = until(client, job_id, lambda job: job["finished_at"] is not None)
    until_let_go(client, job_id.removeprefix("ft"))
    return job


def at_step(number: int) -> Callable[[dict[str, Any]], bool]:
    return lambda job: job["progress"].get("step") == number


def messages(client: TestClient, job_id: str) -> list[str]:
    return [event["message"] for event in client.get(f"{JOBS}/{job_id}/events?limit=100").json()["data"]][::-1]


def attempts(built: World) -> list[int]:
    return [int(line) for line in (built.settings.data_dir / "fine-tuning" / "attempts").read_text().split()]


def test_a_job_becomes_an_adapter_that_chat_accepts_at_once(
    client: TestClient, control: Callable[..., None], file_id: str, built: World
) -> None:
    made = create(client, file_id, suffix="sea", seed=1, metadata={"team": "blue"}).json()
    assert (made["object"], made["model"], made["training_file"], made["seed"], made["fine_tuned_model"]) == (
        "fine_tuning.job",
        "tiny",
        file_id,
        1,
        None,
    )
    control("step-1", "step-2")
    running = until(client, made["id"], at_step(2))
    assert (running["status"], running["trained_tokens"]) == ("running", None)
    assert running["estimated_finish"] >= running["created_at"]
    assert running["hyperparameters"] == {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0}
    control("step-3")
    ended = end_of(client, made["id"])
    assert (ended["status"], ended["trained_tokens"], ended["error"]) == ("succeeded", 15, None)
    assert ended["fine_tuned_model"] == f"ft-sea-{made['id'][-8:]}"
    answer = client.post("/v1/chat/completions", json=chat(ended["fine_tuned_model"]))
    assert said(answer.json()).startswith(f"[{ended['fine_tuned_model']}@")
    (results,) = ended["result_files"]
    table = client.get(f"/v1/files/{results}/content").text.splitlines()
    assert table[0] == "step,train_loss,valid_loss,learning_rate,gradient_norm,tokens,seconds"
    assert table[3] == "3,1.0,1.5,0.1,1.0,5,1"
    (checkpoint,) = client.get(f"{JOBS}/{made['id']}/checkpoints").json()["data"]
    assert (checkpoint["fine_tuned_model_checkpoint"], checkpoint["step_number"], checkpoint["metrics"]) == (
        f"{ended['fine_tuned_model']}@1",
        3,
        {"step": 3, "train_loss": 1.0, "full_valid_loss": 1.5},
    )
    lineage = client.get(f"/v1/adapters/{ended['fine_tuned_model']}/versions/1").json()["manifest"]["lineage"]
    assert (lineage["run"], lineage["seed"]) == (made["id"], 1)
    assert lineage["data_digest"].startswith("sha256:")
    assert [path.name for path in (built.settings.data_dir / "fine-tuning").iterdir()] == ["attempts"]
    assert 'loraplex_jobs_total{kind="fine_tune",state="succeeded"} 1.0' in client.get("/metrics").text


def test_events_come_newest_first_and_in_pages(client: TestClient, control: Callable[..., None], file_id: str) -> None:
    control("step-1", "step-2", "step-3")
    job_id = create(client, file_id).json()["id"]
    end_of(client, job_id)
    first = client.get(f"{JOBS}/{job_id}/events", params={"limit": 3}).json()
    second = client.get(f"{JOBS}/{job_id}/events", params={"limit": 9, "after": first["last_id"]}).json()
    assert (first["has_more"], second["has_more"]) == (True, False)
    told = [event["message"] for event in (*first["data"], *second["data"])]
    assert told[2:] == [
        "Step 3/3: training loss=1.000",
        "Step 2/3: training loss=2.000",
        "Step 1/3: training loss=3.000",
        "Training begun on 9 rows, 1 held out",
        "Validating files",
    ]
    step = second["data"][0] | {"id": "", "created_at": 0}
    assert step == {
        "id": "",
        "object": "fine_tuning.job.event",
        "created_at": 0,
        "level": "info",
        "type": "metrics",
        "message": "Step 2/3: training loss=2.000",
        "data": {"step": 2, "total_steps": 3, "train_loss": 2.0},
    }
    assert client.get(f"{JOBS}/{job_id}/events", params={"after": "x"}).json()["error"]["param"] == "after"


def test_wrong_data_fail_the_job_with_their_place(
    client: TestClient, control: Callable[..., None], file_id: str
) -> None:
    control("wrong", text="training_file/rows.jsonl:3:messages[0].role: expected one of system, user, assistant")
    ended = end_of(client, create(client, file_id).json()["id"])
    assert (ended["status"], ended["fine_tuned_model"]) == ("failed", None)
    assert ended["error"] == {
        "code": "bad_data",
        "message": "training_file/rows.jsonl:3:messages[0].role: expected one of system, user, assistant",
        "param": "training_file",
    }


def test_a_job_pauses_and_goes_on(client: TestClient, control: Callable[..., None], file_id: str, built: World) -> None:
    job_id = create(client, file_id).json()["id"]
    control("step-1")
    until(client, job_id, at_step(1))
    client.post(f"{JOBS}/{job_id}/pause")
    until(client, job_id, lambda job: job["status"] == "paused")
    (process,) = attempts(built)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    control("step-2", "step-3")
    assert client.post(f"{JOBS}/{job_id}/resume").json()["status"] == "queued"
    assert end_of(client, job_id)["status"] == "succeeded"


def test_a_job_that_is_cancelled_ends_at_once_and_leaves_nothing(
    client: TestClient, control: Callable[..., None], file_id: str, built: World
) -> None:
    running, waiting = (create(client, file_id).json()["id"] for _ in range(2))
    control("step-1")
    until(client, running, at_step(1))
    assert client.get(f"{JOBS}/{waiting}").json()["status"] == "queued", "one trains at a time"
    assert client.post(f"{JOBS}/{waiting}/cancel").json()["status"] == "cancelled"
    client.post(f"{JOBS}/{running}/cancel")
    assert end_of(client, running)["status"] == "cancelled"
    again = client.post(f"{JOBS}/{running}/pause")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_ended")
    (process,) = attempts(built)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert [path.name for path in (built.settings.data_dir / "fine-tuning").iterdir()] == ["attempts"]


def test_a_training_process_that_is_killed_is_begun_again(
    client: TestClient, control: Callable[..., None], file_id: str, built: World
) -> None:
    job_id = create(client, file_id).json()["id"]
    control("step-1")
    until(client, job_id, at_step(1))
    os.kill(attempts(built)[0], signal.SIGKILL)
    control("step-2", "step-3")
    assert end_of(client, job_id)["status"] == "succeeded"
    assert len(attempts(built)) == 2
    assert "the training process ended with SIGKILL; queued again" in messages(client, job_id)


def test_a_stop_gives_the_job_back_and_the_next_start_ends_it(
    tiny_base: Path, tmp_path: Path, built: World, control: Callable[..., None]
) -> None:
    with built.client() as client:
        job_id = create(client, send(client, ROW * 40).json()["id"]).json()["id"]
        control("step-1")
        until(client, job_id, at_step(1))
    control("step-2", "step-3")
    with world(tiny_base, tmp_path / "data").client() as client:
        wait_until_ready(client)
        assert end_of(client, job_id)["status"] == "succeeded"


def test_a_file_may_go_once_the_job_has_begun(
    client: TestClient, control: Callable[..., None], file_id: str, built: World
) -> None:
    job_id = create(client, file_id).json()["id"]
    control("step-1")
    until(client, job_id, at_step(1))
    client.delete(f"/v1/files/{file_id}")
    os.kill(attempts(built)[0], signal.SIGKILL)
    control("step-2", "step-3")
    assert end_of(client, job_id)["status"] == "succeeded"


def test_a_file_that_went_before_fails_the_job(client: TestClient, control: Callable[..., None], file_id: str) -> None:
    first, second = (create(client, file_id).json()["id"] for _ in range(2))
    until(client, first, lambda job: job["status"] == "running")
    client.delete(f"/v1/files/{file_id}")
    client.post(f"{JOBS}/{first}/cancel")
    error = end_of(client, second)["error"]
    assert (error["code"], error["param"]) == ("file_not_found", "training_file")


def test_lists_come_newest_first_in_pages_and_by_metadata(client: TestClient, file_id: str) -> None:
    plain = create(client, file_id).json()["id"]
    blue = create(client, file_id, metadata={"team": "blue"}).json()["id"]
    for job_id in (blue, plain):
        client.post(f"{JOBS}/{job_id}/cancel")
    newest = client.get(JOBS, params={"limit": 1}).json()
    assert ([job["id"] for job in newest["data"]], newest["has_more"]) == ([blue], True)
    rest = client.get(JOBS, params={"after": blue}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([plain], False)
    for query, found in {"metadata[team]=blue": [blue], "metadata[team]=red": [], "metadata=null": [plain]}.items():
        assert [job["id"] for job in client.get(f"{JOBS}?{query}").json()["data"]] == found


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, str]]:
    """For requests that make no job."""
    from tests.adapters.factories import write_base

    root = tmp_path_factory.mktemp("refusing")
    with world(write_base(root / "tiny"), root / "data").client() as client:
        yield client, send(client).json()["id"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"training_file": "file-1"}, "file_not_found", "training_file"),
        ({"validation_file": "file-1"}, "file_not_found", "validation_file"),
        ({"suffix": "no spaces"}, "bad_request", "suffix"),
        ({"suffix": "x" * 65}, "bad_request", "suffix"),
        ({"seed": -1}, "bad_request", "seed"),
        ({"seed": "x"}, "bad_request", "seed"),
        ({"metadata": {"a": 1}}, "bad_request", "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, "bad_request", "metadata"),
        ({"unknown": 1}, "bad_request", "unknown"),
        ({"integrations": [{"type": "wandb"}]}, "unsupported", "integrations"),
        ({"method": {"type": "dpo", "dpo": {}}}, "unsupported", "method.type"),
        ({"method": {"type": "reinforcement"}}, "unsupported", "method.type"),
        ({"method": {"type": "other"}}, "bad_request", "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, "bad_request", "hyperparameters.n_epochs"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": "big"}}}},
            "bad_request",
            "method.supervised.hyperparameters.batch_size",
        ),
        ({"hyperparameters": {"rank": 4}}, "bad_hyperparameters", "hyperparameters.rank"),
        ({"hyperparameters": {"r": "four"}}, "bad_hyperparameters", "hyperparameters"),
        ({"hyperparameters": {"init_lora_weights": "pissa"}}, "bad_hyperparameters", "hyperparameters"),
        ({"hyperparameters": {"output_dir": "/etc"}}, "bad_hyperparameters", "hyperparameters.output_dir"),
    ],
)
def test_what_cannot_be_done_is_refused_before_there_is_a_job(
    standing: tuple[TestClient, str], fields: dict[str, Any], code: str, param: str
) -> None:
    client, file_id = standing
    answer = client.post(JOBS, json={"model": "tiny", "training_file": file_id, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"], error["type"]) == (
        400,
        code,
        param,
        "invalid_request_error",
    )
    assert client.get(JOBS).json()["data"] == []


def test_an_unknown_model_is_not_found(standing: tuple[TestClient, str]) -> None:
    client, file_id = standing
    answer = create(client, file_id, model="nobody")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_is_trained_further_in_the_form_that_it_has(
    client: TestClient, control: Callable[..., None], file_id: str, built: World
) -> None:
    upload(client, "first")
    refused = create(client, file_id, model="first", hyperparameters={"r": 16})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "hyperparameters.r")
    job_id = create(client, file_id, model="first").json()["id"]
    control("step-1")
    until(client, job_id, at_step(1))
    directory = built.settings.data_dir / "fine-tuning" / job_id.removeprefix("ft")
    run = json.loads((directory / "run.yaml").read_text())
    assert run["peft"] == {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    assert (Path(run["model"]["adapter_name_or_path"]) / "adapter_model.safetensors").exists()
    control("step-2", "step-3")
    model = end_of(client, job_id)["fine_tuned_model"]
    lineage = client.get(f"/v1/adapters/{model}/versions/1").json()["manifest"]["lineage"]
    assert lineage["parents"] == ["first@1"]


@pytest.mark.parametrize("job_id", ["ftjob-1", "job-1", "x", "ft"])
def test_unknown_jobs_are_not_found(standing: tuple[TestClient, str], job_id: str) -> None:
    client, _ = standing
    for path in ("", "/events", "/checkpoints"):
        assert client.get(f"{JOBS}/{job_id}{path}").status_code == 404
    for verb in ("cancel", "pause", "resume"):
        assert client.post(f"{JOBS}/{job_id}/{verb}").status_code == 404


def test_it_can_be_switched_off(tiny_base: Path, tmp_path: Path) -> None:
    with world(tiny_base, tmp_path / "off", fine_tuning=False).client() as client:
        answer = create(client, send(client).json()["id"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "fine_tuning_off")
