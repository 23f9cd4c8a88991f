"""The node's side: every way in which a run can end is an outcome, and the outcome arrives."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from gone import is_gone

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.node import supervise, worker
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.worker import TrialTimeout, evaluate, interpret, run_trial, time_limit
from deephyper_balsam.store.gateway import Gateway

pytest_plugins = ["balsam_fixtures"]

JOB = RunningJob(3, {"x": 1.5, "units": 8})


class Speechless(Exception):
    """An object, and an exception, whose words raise."""

    def __repr__(self) -> str:
        raise ZeroDivisionError

    def __str__(self) -> str:
        raise SystemExit(3)


def outcome_of(returned: Any) -> dict[str, Any]:
    return evaluate(lambda job: returned, JOB)


class Tensor:
    """The face of a torch tensor: `item`, `numel`, `tolist`, and `size` as a method."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __repr__(self) -> str:  # a test's name must be the same in every process
        return f"Tensor{self.values}"

    def numel(self) -> int:
        return len(self.values)

    def size(self) -> tuple[int, ...]:
        return (len(self.values),)

    def tolist(self) -> list[float]:
        return list(self.values)

    def item(self) -> float:
        if len(self.values) != 1:
            raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")
        return self.values[0]


# --- what the run function gets --------------------------------------------------------------------------------------


def test_the_job_is_a_mapping_with_deephypers_face() -> None:
    assert JOB["x"] == 1.5
    assert JOB.get("dropout", 0.1) == 0.1
    assert "units" in JOB
    assert dict(JOB) == JOB.parameters == {"x": 1.5, "units": 8}
    assert len(JOB) == 2
    assert JOB.id == 3
    assert repr(JOB) == "RunningJob(id=3, parameters={'x': 1.5, 'units': 8})"
    assert {**JOB} == {"x": 1.5, "units": 8}
    with pytest.raises(KeyError):
        JOB["dropout"]


def test_changing_the_parameters_leaves_the_callers_configuration_alone() -> None:
    config = {"x": 1}
    RunningJob(0, config).parameters["x"] = 2
    assert config == {"x": 1}


# --- what it may return ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "objective"),
    [
        (Decimal("0.25"), 0.25),
        (Fraction(1, 4), 0.25),
        (0.93, 0.93),
        (1, 1.0),
        (-0.0, 0.0),
        (10**20, 1e20),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7.0),
        (np.array([0.25]), 0.25),
        (np.array(0.25), 0.25),
        (np.array([[0.25]]), 0.25),
        (Tensor(0.75), 0.75),
        ({"objective": 0.9}, 0.9),
        ({"objective": np.array([0.9])}, 0.9),
        ({"objective": 2, "metadata": None}, 2.0),
    ],
    ids=str,
)
def test_a_number_in_any_of_these_clothes_is_the_objective(returned: Any, objective: float) -> None:
    outcome = outcome_of(returned)
    assert (outcome["objective"], outcome["failure"], outcome["metadata"]) == (objective, None, {})
    assert type(outcome["objective"]) is float


@pytest.mark.parametrize(
    ("returned", "failure"),
    [
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        (-math.inf, "returned -inf"),
        (np.float64("nan"), "returned nan"),
        (None, "returned None instead of a number (is a `return` missing?)"),
        (True, "returned bool instead of a number: True"),
        (Decimal("nan"), "returned nan"),
        (Decimal("snan"), "returned nan"),
        (Decimal("1e999"), "returned inf"),
        (Fraction(10**400), "returned a Fraction too large for a float"),
        (np.True_, "returned bool instead of a number: True"),
        ("0.93", "returned text instead of a number: '0.93'"),
        ("", "returned text instead of a number: ''"),
        ("F_out_of_memory", "out_of_memory"),
        ("F", "the run function returned 'F'"),
        ("F_", "the run function returned 'F'"),
        ("F: diverged", "diverged"),
        (np.array([1.0, 2.0]), "returned ndarray instead of a number: array([1., 2.])"),
        (np.array([]), "returned ndarray instead of a number: array([], dtype=float64)"),
        ([0.9], "returned list instead of a number: [0.9]"),
        ((0.9, 0.1), "returned tuple instead of a number: (0.9, 0.1)"),
        (1 + 2j, "returned complex instead of a number: (1+2j)"),
        (10**400, "returned an integer too large for a float"),
        ({"loss": 0.1, "acc": 1}, "returned a dict without \"objective\" (its keys: ['acc', 'loss'])"),
        ({}, 'returned a dict without "objective" (its keys: [])'),
        ({"objective": None}, "returned None instead of a number (is a `return` missing?)"),
        ({"objective": "F_nan_loss"}, "nan_loss"),
    ],
    ids=str,
)
def test_anything_else_is_a_failure_that_says_what_came(returned: Any, failure: str) -> None:
    outcome = outcome_of(returned)
    assert (outcome["objective"], outcome["failure"]) == (None, failure)


def test_a_tensor_of_two_numbers_is_a_failure() -> None:
    assert outcome_of(Tensor(1.0, 2.0))["failure"].startswith("returned Tensor instead of a number")


def test_an_object_that_cannot_even_be_shown_is_a_failure() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise ValueError("do not look at me")

    failure = outcome_of(Shy())["failure"]
    assert failure == "returned Shy instead of a number: (its repr raises ValueError)"


def test_a_failure_keeps_its_metadata() -> None:
    outcome = interpret({"objective": "F_diverged", "metadata": {"epoch": 3}})
    assert (outcome["failure"], outcome["metadata"]) == ("diverged", {"epoch": 3})


# --- metadata --------------------------------------------------------------------------------------------------------


def metadata_of(metadata: Any) -> Any:
    outcome = outcome_of({"objective": 1.0, "metadata": metadata})
    assert outcome["objective"] == 1.0
    text = json.dumps(outcome, allow_nan=False)
    assert len(text) < 60_000
    orjson.dumps(json.loads(text))  # what Balsam's server does when it is asked for the job
    return outcome["metadata"]


def test_metadata_becomes_json_and_what_json_cannot_hold_becomes_text() -> None:
    assert metadata_of(
        {
            "loss": np.float32(0.5),
            "curve": np.array([1, 2]),
            "tensor": Tensor(1.0, 2.0),
            "flags": (True, None),
            "names": {"a"},
            3: "three",
            "nan": math.nan,
            "path": Path("/tmp/model"),
            "nested": {"deep": [{"inf": math.inf}]},
        }
    ) == {
        "loss": 0.5,
        "curve": [1, 2],
        "tensor": [1.0, 2.0],
        "flags": [True, None],
        "names": ["a"],
        "3": "three",
        "nan": "nan",
        "path": "/tmp/model",
        "nested": {"deep": [{"inf": "inf"}]},
    }


def test_metadata_that_is_no_dict_is_kept_under_its_own_name() -> None:
    assert metadata_of([1, 2]) == {"metadata": [1, 2]}


def test_what_is_too_large_is_named_and_left_out_and_the_rest_kept() -> None:
    assert metadata_of({"epochs": 3, "weights": list(range(100_000))}) == {
        "epochs": 3,
        "weights": "(too large, left out)",
    }


def test_too_many_keys_are_left_out_together() -> None:
    assert metadata_of({f"k{n}": n for n in range(50_000)}) == {"metadata": "(left out: 50000 keys are too many)"}


def test_metadata_that_holds_itself_does_not_cost_the_objective() -> None:
    circle: dict[str, Any] = {}
    circle["self"] = circle
    assert metadata_of(circle)["metadata"].startswith("(left out: RecursionError")


def test_text_and_numbers_that_balsams_api_cannot_answer_with_are_made_harmless() -> None:
    assert metadata_of({"file": "caf\udce9.txt", "\udce9": 1, "seed": 2**64, "small": -(2**63) + 1}) == {
        "file": "caf\\udce9.txt",
        "\\udce9": 1,
        "seed": str(2**64),
        "small": -(2**63) + 1,
    }


# --- what it may raise -----------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[[RunningJob], Any]:
    def run(job: RunningJob) -> Any:
        raise error

    return run


def test_an_exception_is_a_failure_with_its_traceback_from_the_users_frame_on() -> None:
    outcome = evaluate(failing(ValueError("the loss\n is  negative")), JOB)
    assert outcome["failure"] == "ValueError: the loss is negative"
    assert "in run" in outcome["traceback"]
    assert "deephyper_balsam/node/worker.py" not in outcome["traceback"]
    assert outcome["objective"] is None


def test_an_exception_without_words_is_named_by_its_class() -> None:
    assert evaluate(failing(MemoryError()), JOB)["failure"] == "MemoryError"


@pytest.mark.parametrize(("code", "said"), [(0, "0"), (None, "None"), ("bye", "'bye'")])
def test_sys_exit_is_a_failure_whatever_its_code(code: Any, said: str) -> None:
    assert evaluate(failing(SystemExit(code)), JOB)["failure"] == f"the run function called sys.exit({said})"


def test_endless_recursion_is_a_failure_with_a_short_traceback() -> None:
    def run(job: RunningJob) -> Any:
        return run(job)

    outcome = evaluate(run, JOB)
    assert outcome["failure"].startswith("RecursionError")
    assert len(outcome["traceback"]) <= 20_000


def test_a_long_message_is_cut() -> None:
    outcome = evaluate(failing(ValueError("x" * 100_000)), JOB)
    assert len(outcome["failure"]) == 500
    assert len(outcome["traceback"]) <= 20_000


def test_a_message_with_broken_unicode_can_be_stored_and_read_again() -> None:
    outcome = evaluate(failing(FileNotFoundError("no file caf\udce9.txt")), JOB)
    assert outcome["failure"] == "FileNotFoundError: no file caf\\udce9.txt"
    orjson.dumps(outcome)


def test_keyboard_interrupt_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(failing(KeyboardInterrupt()), JOB)


def test_start_end_and_host_are_those_of_the_run() -> None:
    times = iter([100.0, 107.5])
    outcome = evaluate(lambda job: 1.0, JOB, clock=lambda: next(times))
    assert (outcome["start"], outcome["end"], outcome["host"]) == (100.0, 107.5, socket.gethostname())


def test_what_a_run_prints_goes_to_the_jobs_output(capsys: pytest.CaptureFixture[str]) -> None:
    def run(job: RunningJob) -> float:
        print("epoch 1\x00\udce9".encode("utf-8", "replace"))
        return 1.0

    assert evaluate(run, JOB)["objective"] == 1.0
    assert "epoch 1" in capsys.readouterr().out


# --- the time limit --------------------------------------------------------------------------------------------------


def test_python_code_over_its_time_gets_the_timeout_even_through_except_exception() -> None:
    def run(job: RunningJob) -> float:
        while True:
            try:
                time.sleep(10)
            except Exception:
                continue

    began_at = time.monotonic()
    with time_limit(0.2):
        outcome = evaluate(run, JOB)
    assert outcome["failure"] == "timed out after 0.2 s"
    assert time.monotonic() - began_at < 5


def test_a_run_within_its_time_leaves_no_timer() -> None:
    for limit_s in (60, None, 0):
        with time_limit(limit_s):
            outcome = evaluate(lambda job: 2.0, JOB)
        assert outcome["objective"] == 2.0
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_the_timeout_passes_through_code_that_is_not_evaluated() -> None:
    with pytest.raises(TrialTimeout, match=r"timed out after 0\.1 s"), time_limit(0.1):
        time.sleep(10)


# --- inside Balsam ---------------------------------------------------------------------------------------------------


class Client:
    """Balsam's client as `deliver` uses it: the network is away while `down` is true."""

    def __init__(self, down: bool = False) -> None:
        self.down = down
        self.sent: list[Any] = []
        self.now: dict[str, Any] | None = None

    def get(self, url: str) -> Any:
        if self.down:
            raise TimeoutError("Exceeded max retries")
        return self.now and {"data": self.now}

    def bulk_patch(self, url: str, rows: list[Any]) -> None:
        if self.down:
            raise TimeoutError("Exceeded max retries")
        self.sent.append((url, rows))


def app_for(client: Any, data: dict[str, Any] | None = None, nodes: int = 1, ranks: int = 1) -> Any:
    job = SimpleNamespace(id=17, data=data or {}, tags={"trial": "4"}, num_nodes=nodes, ranks_per_node=ranks)
    return SimpleNamespace(job=job, _client=client)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run function that counts its calls in a file."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "counted_run.py"
    file.write_text(
        "import pathlib\n"
        "def run(job):\n"
        "    with open('calls', 'a') as calls:\n"
        "        calls.write(f'{job.id} {job[\"x\"]}\\n')\n"
        "    return job['x'] * 2\n"
    )
    return {"kind": "function", "name": "counted", "target": f"{file}:run", "search_path": []}


def test_the_outcome_is_written_beside_what_the_jobs_data_held(spec: dict[str, Any]) -> None:
    client = Client()
    outcome = run_trial(app_for(client, {"asked": {"kind": "model"}}), spec, {"x": 2.0})
    assert outcome["objective"] == 4.0
    assert client.sent == [("jobs/", [{"id": 17, "data": {"asked": {"kind": "model"}, "result": outcome}}])]
    assert Path("calls").read_text(encoding="utf-8") == "4 2.0\n"


def test_a_trial_that_has_a_result_is_not_run_again(spec: dict[str, Any]) -> None:
    client = Client()
    before = {"objective": 0.5, "failure": None}
    assert run_trial(app_for(client, {"result": before}), spec, {"x": 2.0}) == before
    assert not Path("calls").exists()
    assert client.sent == []


def test_a_job_that_another_one_has_replaced_is_not_evaluated(spec: dict[str, Any]) -> None:
    client = Client()
    outcome = run_trial(app_for(client, {"set_aside": {"why": "job 7 stands for the same trial"}}), spec, {"x": 2.0})
    assert (outcome["objective"], outcome["failure"]) == (None, "not evaluated: job 7 stands for the same trial")
    assert not Path("calls").exists()
    assert client.sent == []


def test_where_the_api_is_out_of_reach_the_return_value_brings_the_outcome(
    spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_trial(app_for(Client(down=True)), spec, {"x": 2.0})
    assert outcome["objective"] == 4.0
    assert "it goes by the return value" in capsys.readouterr().out


def test_a_run_function_that_cannot_be_loaded_on_the_node_is_a_failure_and_no_crash(spec: dict[str, Any]) -> None:
    outcome = run_trial(app_for(Client()), {**spec, "target": "/nowhere/run.py:run"}, {"x": 2.0})
    assert outcome["failure"].startswith("TargetError: /nowhere/run.py does not exist on")


@pytest.mark.parametrize("variable", worker._RANK_VARIABLES)
def test_only_the_first_rank_delivers(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in worker._RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    printed = sys.stdout
    for rank, sent in (("1", 0), ("0", 1)):
        client = Client()
        monkeypatch.setenv(variable, rank)
        assert worker.rank() == int(rank)
        monkeypatch.setattr(sys, "stdout", printed)
        assert run_trial(app_for(client, nodes=2, ranks=2), spec, {"x": 2.0})["objective"] == 4.0
        assert len(client.sent) == sent
        assert (sys.stdout is printed) is bool(sent)  # nor does Balsam print what the others return


def test_a_run_of_one_process_delivers_whatever_rank_the_environment_names(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")  # that of the launcher
    client = Client()
    run_trial(app_for(client), spec, {"x": 2.0})
    assert len(client.sent) == 1


def test_the_time_limit_of_the_job_ends_the_run_and_the_processes_it_started(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text(
        "import subprocess, time\n"
        "def run(job):\n"
        "    child = subprocess.Popen(['sleep', '300'])\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(300)\n"
    )
    client = Client()
    spec = {"kind": "function", "name": "slow", "target": f"{file}:run", "search_path": []}
    outcome = run_trial(app_for(client, {"eval_timeout_s": 0.5}), spec, {})
    assert outcome["failure"] == "timed out after 0.5 s"
    assert client.sent[0][1][0]["data"]["result"] == outcome
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_children_that_outlive_a_good_run_are_ended(tmp_path: Path) -> None:
    file = tmp_path / "leaver.py"
    file.write_text(
        "import subprocess\n"
        "def run(job):\n"
        "    child = subprocess.Popen(['bash', '-c', 'trap \"\" TERM; sleep 300'])\n"
        "    return float(child.pid)\n"
    )
    spec = {"kind": "function", "name": "leaver", "target": f"{file}:run", "search_path": []}
    pid = int(run_trial(app_for(Client()), spec, {})["objective"])
    assert is_gone(pid)


def job_in(api: BalsamApi, site: VirtualSite, gateway: Gateway, **data: Any) -> int:
    app = {"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""}
    app_id = gateway.create_app(app)["id"]
    job = {"app_id": app_id, "workdir": "a", "tags": {"search": "s", "trial": "0"}, "data": data}
    return gateway.create_jobs([job])[0]


def test_the_failure_of_a_run_that_does_not_react_arrives_through_a_real_api(
    api: BalsamApi, site: VirtualSite, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "STOP_GRACE_S", 0.2)
    job_id = job_in(api, site, gateway, eval_timeout_s=0.2)
    (tmp_path / "hang.py").write_text(
        "import signal, time\n"
        "def run(job):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "    time.sleep(300)\n"
    )
    job = SimpleNamespace(id=job_id, data={"eval_timeout_s": 0.2}, tags={"trial": "0"}, num_nodes=1, ranks_per_node=1)
    spec = {"kind": "function", "target": str(tmp_path / "hang.py:run")}
    run_trial(SimpleNamespace(job=job, _client=gateway._client), spec, {})
    assert api.jobs[job_id]["data"]["result"]["failure"] == "timed out after 0.2 s"
    assert api.jobs[job_id]["data"]["eval_timeout_s"] == 0.2


def test_what_others_wrote_into_the_job_while_the_run_went_on_stays(spec: dict[str, Any]) -> None:
    client = Client()
    client.now = {"cancelled": 5.0}
    outcome = run_trial(app_for(client, {"asked": {}}), spec, {"x": 2.0})
    assert client.sent == [("jobs/", [{"id": 17, "data": {"cancelled": 5.0, "result": outcome}}])]


def test_the_result_of_another_run_of_the_same_job_stays(spec: dict[str, Any]) -> None:
    client = Client()
    client.now = {"result": {"objective": 0.25}}
    assert run_trial(app_for(client), spec, {"x": 2.0})["objective"] == 4.0
    assert client.sent == []


@pytest.mark.parametrize(
    ("body", "failure", "fault"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?)", "machine"),
        (
            "import faulthandler; faulthandler.disable(); os.kill(os.getpid(), 11)",
            "killed by SIGSEGV (a crash outside Python)",
            "machine",
        ),
        (
            "os._exit(3)",
            "the run ended its own process with status 3 and left no result (os._exit, or a library that exits?)",
            None,
        ),
        ("raise MemoryError", "MemoryError", None),
        ("os.closerange(3, 200)", "the run ended its own process with status 1 and left no result", None),
    ],
)
def test_a_run_that_ends_its_own_process_is_a_failure_and_whose_fault_is_said(
    tmp_path: Path, body: str, failure: str, fault: str | None
) -> None:
    (tmp_path / "die.py").write_text(f"import os\ndef run(job):\n    {body}\n    return 1.0\n")
    client = Client()
    outcome = run_trial(app_for(client), {"kind": "function", "target": str(tmp_path / "die.py:run")}, {})
    assert outcome["failure"].startswith(failure)
    assert outcome.get("fault") == fault
    assert outcome["host"] == socket.gethostname()
    assert client.sent[0][1][0]["data"]["result"] == outcome


def test_what_a_run_wrote_into_job_out_itself_is_made_harmless_byte_by_byte(spec: dict[str, Any]) -> None:
    written = b"ok \xff\xfe \xe9t\xc3\xa9 BALSAM-RETURN-VALUE mine\n"
    Path("job.out").write_bytes(written)
    run_trial(app_for(Client()), spec, {"x": 1.0})
    assert Path("job.out").read_text(encoding="utf-8") == "ok ?? ?té BALSAM RETURN VALUE mine\n"
    assert Path("job.out").stat().st_size == len(written)


def test_a_run_that_fills_its_memory_has_room_left_to_say_so(tmp_path: Path) -> None:
    (tmp_path / "fill.py").write_text(
        "import pathlib, resource\n"
        "def run(job):\n"
        "    now = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))\n"
        "    held = []\n"
        "    while True:\n"
        "        held.append(bytearray(2**9))\n"
    )
    outcome = run_trial(app_for(Client()), {"kind": "function", "target": str(tmp_path / "fill.py:run")}, {})
    assert (outcome["failure"], "fault" in outcome) == ("MemoryError", False)
    assert "held.append" in outcome["traceback"]


def test_a_rank_that_was_killed_fails_so_that_mpi_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "die.py").write_text("import os\ndef run(job):\n    os.kill(os.getpid(), 9)\n")
    with pytest.raises(RuntimeError, match="killed by SIGKILL"):
        run_trial(app_for(Client(), ranks=2), {"kind": "function", "target": str(tmp_path / "die.py:run")}, {})


def test_every_update_of_a_job_in_the_agent_leaves_the_same_columns() -> None:
    from balsam._api.models import Job
    from balsam.schemas import serialize

    def job(job_id: int) -> Any:
        made = {"id": job_id, "app_id": 1, "workdir": "a", "parent_ids": [], "last_update": "2024-01-01T00:00:00"}
        blank = {"pending_file_cleanup": True, "serialized_parameters": "", "serialized_return_value": ""}
        return Job._from_api({**made, **blank, "serialized_exception": "", "state": "RUN_DONE"})

    fresh, ended, raised = job(1), job(2), job(3)
    for one in (ended, raised):  # as the agent's worker does before it calls postprocess
        one.state = "RUN_DONE"
    ended._update_model.serialized_return_value = serialize(4.0)
    raised._update_model.serialized_exception = serialize((ValueError(), None))
    for one, state in ((fresh, "PREPROCESSED"), (ended, "POSTPROCESSED"), (raised, "FAILED")):
        worker.even_update(one, state)
    updates = [one._update_model.dict(exclude_unset=True) for one in (fresh, ended, raised)]
    assert {frozenset(update) for update in updates} == {
        frozenset({"state", "serialized_return_value", "serialized_exception"})
    }
    assert updates[1]["serialized_return_value"] == serialize(4.0)
    assert [update["state"] for update in updates] == ["PREPROCESSED", "POSTPROCESSED", "FAILED"]


def test_the_worker_prints_nothing_of_its_own_for_a_good_run(
    spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_trial(app_for(Client()), spec, {"x": 1.0})
    assert capsys.readouterr().out == ""


def test_the_rank_without_mpi_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in worker._RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert worker.rank() == 0
    monkeypatch.setitem(os.environ, "PMI_RANK", "none")
    assert worker.rank() == 0


def test_an_exception_whose_words_raise_is_a_failure_with_its_class() -> None:
    def run(job: RunningJob) -> float:
        raise Speechless

    outcome = evaluate(run, JOB)
    assert outcome["failure"] == "Speechless: (its __str__ raises SystemExit)"
    assert "in run" in outcome["traceback"]


def test_an_object_without_words_is_no_objective() -> None:
    failure = outcome_of(Speechless())["failure"]
    assert failure == "returned Speechless instead of a number: (its repr raises ZeroDivisionError)"


def test_an_exit_with_an_object_whose_words_raise_is_a_failure() -> None:
    def run(job: RunningJob) -> float:
        raise SystemExit(Speechless())

    assert evaluate(run, JOB)["failure"] == "the run function called sys.exit((its repr raises ZeroDivisionError))"


def test_metadata_of_an_array_leaves_the_objective_good() -> None:
    outcome = outcome_of({"objective": 0.5, "metadata": np.arange(3)})
    assert (outcome["objective"], outcome["metadata"]) == (0.5, {"metadata": [0, 1, 2]})


@pytest.mark.parametrize("text", ["a\udcffb", "a\0b"])
def test_what_balsam_cannot_hold_is_escaped_wherever_a_run_says_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: text)

    def fails(job: RunningJob) -> float:
        raise RuntimeError(text)

    for outcome in (evaluate(fails, JOB), outcome_of({"objective": 1, "metadata": {text: [text]}}), outcome_of(text)):
        said = json.dumps(outcome, ensure_ascii=False)
        said.encode("utf-8")
        assert "\\u0000" not in said
        assert text not in said
