"""A search to watch on the fake of Balsam's API: four evaluations are its budget, five trials wait."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import SearchRecord, create_record
from deephyper_balsam.store.trial_rows import trial_job
from deephyper_balsam.trial import Origin, Resources, Trial


@pytest.fixture
def record(gateway: Gateway, site: VirtualSite, api: BalsamApi) -> SearchRecord:
    problem = HpProblem("net")
    problem.add_hyperparameter((1, 99), "layers")
    settings = {
        "problem": problem.to_dict(),
        "method": "random",
        "site": "lab",
        "resources": asdict(Resources()),
        "max_evals": 4,
        "timeout": None,
    }
    return create_record(gateway, "s", settings, site.id, gateway.now() - 60.0)


@pytest.fixture
def ids(gateway: Gateway, site: VirtualSite, record: SearchRecord) -> list[int]:
    """Five trials of the search, all waiting."""
    words = ("serialized_class", "source_code", "description")
    app = gateway.create_app(
        {"site_id": site.id, "name": "f", "parameters": {}, "transfers": {}, **dict.fromkeys(words, "x")}
    )
    trials = [Trial(number, {"layers": number + 1}, Origin("random")) for number in range(5)]
    needs = Resources(evals_per_node=2)
    return gateway.create_jobs([trial_job(trial, "s", app["id"], needs, gateway.now(), None) for trial in trials])
