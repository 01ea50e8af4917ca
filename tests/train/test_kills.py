import importlib

import pytest

from tests.train.kills import kill_and_resume


@pytest.fixture(autouse=True)
def _ready_to_fork(one_thread):
    """Imports here what the processes of a run would import, since they are forked from this one."""
    importlib.import_module("retina_fast.train")


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path, kills):
    assert len(kill_and_resume(tmp_path, kills=kills, processes=1, seed=1)) == kills
