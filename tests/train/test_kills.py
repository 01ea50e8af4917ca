from tests.train.kills import kill_and_resume


def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path):
    assert len(kill_and_resume(tmp_path, kills=3, processes=1, seed=1)) == 3
