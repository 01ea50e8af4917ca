from retina_fast.train.log import TrainLog
from retina_fast.train.pace import Pace


def test_half_a_row_of_the_log_is_dropped(tmp_path):
    log = TrainLog(tmp_path)
    log.resume(0)
    for step in (20, 40):
        log.add(step, {"classification": 1.0, "bbox_regression": 2.0}, {"lr": 0.1}, last=False)
    text = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(text.rstrip()[:-8])
    log = TrainLog(tmp_path)
    log.resume(40)
    assert [row["step"] for row in log.rows] == [20]
    assert (tmp_path / "log.csv").read_text().splitlines() == text.splitlines()[:2]


def test_pace_counts_images_and_waiting_and_not_what_came_before():
    pace = Pace(images=8)
    for start in (0.0, 100.0):
        pace.begin(now=start)
        for step in range(3):
            pace.step_begins(now=start + step + 0.25)
            pace.step_ends(now=start + step + 1)
        assert (pace.images_per_second, pace.waiting) == (8, 0.25)
