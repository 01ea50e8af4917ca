import importlib

import pytest

from tests.train.kills import kill_and_resume


@pytest.fixture(autouse=True)
def _ready_to_fork(one_thread):
    """Imports here what the processes of a run would import, since they are forked from this one."""
    importlib.import_module("retina_fast.train")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path):
    assert len(kill_and_resume(tmp_path, kills=5, processes=1, seed=1)) == 5
