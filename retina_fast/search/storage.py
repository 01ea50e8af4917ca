"""Where a study is kept."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from retina_fast.search.workers import Locked

HEARTBEAT = 60
"""Seconds; a worker on a database that is silent for three times as long is taken to be dead."""


def open_storage(folder: Path, url: str | None = None) -> Any:
    """A storage of Optuna: a journal in the folder, or a database that sends heartbeats and retries what is silent.

    Args:
        folder: of the journal and its lock.
        url: of the database, as SQLAlchemy writes it.

    Example::

        >>> open_storage(Path("runs/search"))  # doctest: +SKIP
    """
    import optuna
    from optuna import storages
    from optuna.storages import journal

    if url:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            retry = storages.RetryHeartbeatStaleTrialCallback()
            return storages.RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT,
                grace_period=3 * HEARTBEAT,
                heartbeat_stale_trial_callback=retry,
            )
    path, lock = folder / "study.log", Locked(folder / "study.lock")
    backend: Any = journal.JournalFileBackend

    class Journal(backend):
        """Not flushed to the disk at each of a trial's 60 lines, which takes 0.4 s. A killed process loses none."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            with lock, path.open("ab", buffering=0) as file:
                file.write(lines.encode())

    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):  # the machine went down
        os.truncate(path, content.rfind(b"\n") + 1)
    return storages.JournalStorage(Journal(str(path)))
