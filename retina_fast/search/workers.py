"""Workers on one machine that share a study in one file, and what becomes of a trial whose worker was killed.

Everything that a worker writes about its trials, but for their intermediate scores, happens under one lock, which the
system releases when a process ends in whatever way. Each worker also holds a lock of its own as long as it lives. So
any worker can see whether that of a running trial is dead, and then queues the same point again, once.
"""

import contextlib
import fcntl
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_POLL = 0.2  # seconds between two looks whether the trials of others have ended

WORKER, RETRY_OF, PROBLEM = "worker", "retry_of", "problem"  # attributes of trials


class Locked:
    """A lock of a file, for a `with` block, that ends with the process.

    It has the methods that Optuna's journal asks of a lock.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Locked(Path(folder) / "lock"):
        ...     Locked(Path(folder) / "lock").is_free()
        False
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def acquire(self) -> bool:
        self._file = self.path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> "Locked":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_free(self) -> bool:
        """Whether no process holds it."""
        with contextlib.suppress(BlockingIOError), self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False


def finished(study: Any) -> list[Any]:
    """The trials that count: those that ended with a score, early, or with a problem of their own.

    Example::

        >>> len(finished(study))  # doctest: +SKIP
        30
    """
    return [trial for trial in study.get_trials(deepcopy=False) if _counts(trial)]


def _counts(trial: Any) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED") or PROBLEM in trial.user_attrs


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[str]:
    """The name of a new worker, which is alive until the end of the block or of the process."""
    name = uuid.uuid4().hex
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    with Locked(folder / "workers" / name):
        yield name
    (folder / "workers" / name).unlink()


def work(
    study: Any,
    folder: Path,
    count: int,
    begin: Callable[[Any], Any],
    run: Callable[[Any, Any], dict[str, Any]],
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Take part in a study until it has `count` trials that count, together with the other workers on its file.

    Args:
        study: of Optuna, in a file.
        folder: of the locks.
        count: of trials.
        begin: draws a trial's point, under the lock; its result is given to `run`.
        run: scores the point and returns what `study.tell` is told: a dictionary of its keyword arguments.
        progress: is told how many trials count.

    Example::

        >>> work(study, Path("runs/search"), 30, begin, run)  # doctest: +SKIP
    """
    with joined(folder) as name:
        while True:
            with Locked(folder / "lock"):
                _queue_again(study, folder)
                trials = study.get_trials(deepcopy=False)
                done = sum(map(_counts, trials))
                progress(done)
                if done >= count:
                    return
                states = [trial.state.name for trial in trials]
                is_free = states.count("WAITING") > 0 or done + states.count("RUNNING") < count
                if is_free:
                    trial = study.ask()
                    trial.set_user_attr(WORKER, name)
                    begun = begin(trial)
            if not is_free:
                time.sleep(_POLL)  # the running trials are the last ones, unless their workers die
                continue
            told = run(trial, begun)
            with Locked(folder / "lock"):
                study.tell(trial, **told)


def _queue_again(study: Any, folder: Path) -> None:
    """Under the lock: the point of each running trial whose worker is dead is queued once more, and the trial fails.

    A worker may be killed in here as well: then the point is queued already, and the next one only lets the trial fail.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs}
    for trial in trials:
        name = trial.user_attrs.get(WORKER)
        if trial.state != TrialState.RUNNING or (name and not Locked(folder / "workers" / name).is_free()):
            continue
        if trial.number not in retried:
            study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})
        study.tell(trial.number, state=TrialState.FAIL)
        if name:
            (folder / "workers" / name).unlink(missing_ok=True)
