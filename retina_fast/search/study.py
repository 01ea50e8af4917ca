"""A search for specifications, run by Optuna: without training by the entropy score, or by short training runs.

Without training, the search has two objectives, more entropy and fewer multiply-adds, and its result is the front of
those that none beats in both. With training it has one, the score of the runs, of which Hyperband
(https://arxiv.org/abs/1603.06560) ends those early that promise little. Optuna's samplers prefer what keeps to the
limits. A study lives in a file of its folder, or in a database for several machines. Whoever runs it again goes on with
it, and whoever runs it at the same time takes part.
"""

import csv
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from retina_fast.backbones.specification import Block, as_rows
from retina_fast.backbones.spinenet import SIZES, Size
from retina_fast.backbones.spinenet_mobile import MOBILE_SIZES, MobileSize
from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing
from retina_fast.data.outputs import check_folder
from retina_fast.search.cost import cost
from retina_fast.search.picture import draw, draw_trials
from retina_fast.search.score import entropy_score
from retina_fast.search.space import SPACES, Point, Space
from retina_fast.search.storage import open_storage
from retina_fast.search.trained import Proxy
from retina_fast.search.workers import PROBLEM, Locked, finished, work
from retina_fast.train.model_file import read_model_file, write_model_file

SAMPLERS = ("nsga2", "tpe", "random")
BEST = 5  # specifications that are written and drawn


@dataclass(frozen=True)
class SearchSettings:
    """What decides the trials of a search.

    Attributes:
        space: a name in `retina_fast.search.space.SPACES`.
        model: the builder of the detectors that are searched for, whose size counts for the costs.
        sampler: ``nsga2`` (Deb et al. 2002), ``tpe`` (Bergstra et al. 2011) or ``random``.
        max_macs, min_macs: limits of the multiply-adds for an image of the model's size.
        max_parameters: limit of the parameters, with 91 classes.
        seed: of the sampler and of the training runs.
        fusions: between which each block chooses: None for the plain sum of its two links, ``learned``, or two factors.
        alphas: between which each link chooses; None alone for the network's.

    Raises:
        UserError: for a name that there is not, or a model that is not of the space's family.

    Example::

        >>> SearchSettings("paper", "retinanet_spinenet49", max_macs=85e9).size.image_size
        640
    """

    space: str = "paper"
    model: str = "retinanet_spinenet49"
    sampler: str = "nsga2"
    max_macs: float = math.inf
    min_macs: float = 0.0
    max_parameters: float = math.inf
    seed: int = 0
    fusions: tuple[Any, ...] = (None,)
    alphas: tuple[Any, ...] = (None,)

    def __post_init__(self) -> None:
        for name, known in (("space", SPACES), ("sampler", SAMPLERS), ("model", _models(self.space == "mobile"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

        if self.space == "mobile" and self.alphas != (None,):
            raise UserError("the links of the mobile family have no alphas to choose between")

    @property
    def size(self) -> Size | MobileSize:
        """Of the model."""
        return _models(self.space == "mobile")[self.model]


def _check_folder(folder: Path) -> None:
    """Raises a UserError for a folder with files of the names of a search's, but without its lock: another's."""
    check_folder(folder)
    if not (folder / "lock").exists():
        for file in sorted([folder / "trials.csv", folder / "front.png", *folder.glob("best-*.*")]):
            if file.exists():
                raise UserError(f"{file}: is of no search, which would replace it; give another --output")


def _models(mobile: bool) -> dict[str, Size | MobileSize]:
    if mobile:
        return {f"retinanet_spinenet{name}_mobile": size for name, size in MOBILE_SIZES.items()}
    return {f"retinanet_spinenet{name}": size for name, size in SIZES.items()}


class Found(NamedTuple):
    """A trial that ended with a score and keeps to the limits."""

    number: int
    score: float
    macs: float
    parameters: int
    blocks: tuple[Block, ...]


class Search:
    """A study in a folder.

    Args:
        settings: of the search.
        folder: of its files.
        proxy: how the runs train; None scores without training.
        storage: the URL of a database that several machines share, as SQLAlchemy writes it; a file in the folder by
            default.
        start_from: the folder of another search, whose best specifications are tried first.

    Raises:
        UserError: if the study was begun with other settings, naming them; or if there is nothing to start from.

    Example::

        >>> search = Search(SearchSettings(max_macs=85e9), Path("runs/search"))  # doctest: +SKIP
        >>> search.run(1000)  # doctest: +SKIP
        >>> search.best()[0].score  # doctest: +SKIP
        1123.4
    """

    def __init__(
        self,
        settings: SearchSettings,
        folder: Path,
        proxy: Proxy | None = None,
        storage: str | None = None,
        start_from: Path | None = None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.settings, self.folder, self.proxy, self.storage = settings, folder, proxy, storage
        fusions, alphas = settings.fusions, settings.alphas
        self.space: Space = replace(SPACES[settings.space], fusions=fusions, alphas=alphas)
        _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pruner = optuna.pruners.HyperbandPruner(1, proxy.parts, 3) if proxy else None
        with Locked(folder / "lock"):
            try:
                self.study: Any = optuna.create_study(
                    storage=open_storage(folder, storage),
                    study_name="search",
                    directions=["maximize"] if proxy else ["maximize", "minimize"],
                    pruner=pruner,
                    load_if_exists=True,
                )
            except Exception as error:  # SQLAlchemy's, the database's, or a damaged journal's
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                where = storage or folder / "study.log"
                raise UserError(f"{where}: cannot be opened as a search's study ({why})") from error
            self._check_settings()
            trials = self.study.get_trials(deepcopy=False)
            self.study.sampler = self._sampler(self._own_seed())
            for point in self._points_of(start_from) if start_from and not trials else ():
                self.study.enqueue_trial(point)

    def run(self, count: int, progress: Callable[[int], None] = lambda done: None) -> None:
        """Take part until `count` trials have ended, and write what was found.

        Args:
            count: of trials, over all workers. On a database it is exceeded by those that run when it is reached.
            progress: is told how many trials have ended.

        Raises:
            UserError: if a file cannot be written.
        """
        if self.storage:
            self._run_on_database(count, progress)
        else:
            work(self.study, self.folder, count, self._begin, self._run, progress)
        with Locked(self.folder / "lock"):
            self.write()

    def found(self) -> list[Found]:
        """The trials with a score that keep to the limits."""
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "COMPLETE" and max(self._excess(trial).values()) <= 0:
                blocks = self.space.decode(trial.params)
                attributes = trial.user_attrs
                rows.append(Found(trial.number, trial.values[0], attributes["macs"], attributes["parameters"], blocks))
        return rows

    def front(self) -> list[Found]:
        """Those that none beats in both score and multiply-adds, in the order of their multiply-adds."""
        kept: list[Found] = []
        for trial in sorted(self.found(), key=lambda trial: (trial.macs, -trial.score)):
            if not kept or trial.score > kept[-1].score:
                kept.append(trial)
        return kept

    def best(self, count: int | None = None) -> list[Found]:
        """The different specifications with the highest scores, of which `write` writes BEST."""
        different: dict[tuple[Block, ...], Found] = {}
        for trial in sorted(self.found(), key=lambda trial: -trial.score):
            different.setdefault(trial.blocks, trial)
        return list(different.values())[: count or BEST]

    def write(self) -> None:
        """Write trials.csv, front.png, and for the best specifications best-N.json and best-N.png."""
        found = self.found()
        with replacing(self.folder / "trials.csv") as partial, partial.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["number", "state", "score", "macs", "parameters", "specification"])
            for trial in self.study.get_trials(deepcopy=False):
                complete = set(self.space.sizes) <= set(trial.params)
                blocks = as_rows(self.space.decode(trial.params)) if complete else ""
                score = trial.values[0] if trial.values else ""
                costs = [trial.user_attrs.get(name, "") for name in ("macs", "parameters")]
                rows.writerow([trial.number, trial.state.name, score, *costs, json.dumps(blocks)])
        for number, trial in enumerate(self.best(), start=1):
            write_model_file(
                self.folder / f"best-{number}.json", self.settings.model, {"specification": as_rows(trial.blocks)}
            )
            draw(trial.blocks, self.folder / f"best-{number}.png")
        if found:
            pairs, front = ([(trial.macs, trial.score) for trial in trials] for trials in (found, self.front()))
            draw_trials(pairs, front, self.proxy.metric if self.proxy else "entropy score", self.folder / "front.png")

    def _begin(self, trial: Any) -> tuple[Block, ...]:
        """Draws a trial's point, and says what it costs."""
        point = {name: trial.suggest_int(name, 0, size - 1) for name, size in self.space.sizes.items()}
        blocks = self.space.decode(point)
        counted = cost(blocks, self.settings.size)
        trial.set_user_attr("macs", counted.macs)
        trial.set_user_attr("parameters", counted.parameters)
        for name, excess in self._excess(trial).items():
            if name not in trial.constraints:  # a trial that is tried again has them
                trial.set_constraint(name, excess)
        return blocks

    def _run(self, trial: Any, blocks: Sequence[Block]) -> dict[str, Any]:
        """Scores it; what `study.tell` is told."""
        from optuna import TrialPruned
        from optuna.trial import TrialState

        try:
            return {"values": self._values(trial, blocks)}
        except TrialPruned:
            return {"state": TrialState.PRUNED}
        except UserError:
            return {"state": TrialState.FAIL}

    def _values(self, trial: Any, blocks: Sequence[Block]) -> list[float]:
        from optuna import TrialPruned

        if not self.proxy:
            return [entropy_score(blocks, self.settings.size), trial.user_attrs["macs"]]
        if max(self._excess(trial).values()) > 0:
            raise TrialPruned  # nobody trains what is over the limits

        def report(step: int, score: float) -> None:
            trial.report(score, step)
            if trial.should_prune():
                raise TrialPruned

        run = self.folder / "runs" / f"{trial.number:06}"
        try:
            return [self.proxy.score(blocks, run, self.settings.seed, report)]
        except UserError as error:
            trial.set_user_attr(PROBLEM, str(error))
            raise
        finally:
            shutil.rmtree(run, ignore_errors=True)

    def _excess(self, trial: Any) -> dict[str, float]:
        """By how much a trial breaks each limit, as a part of it; 0 and less keeps it."""
        macs, parameters = trial.user_attrs["macs"], trial.user_attrs["parameters"]
        limits = self.settings
        return {
            "max_macs": macs / limits.max_macs - 1,
            "min_macs": limits.min_macs / macs - 1,
            "max_parameters": parameters / limits.max_parameters - 1,
        }

    def _run_on_database(self, count: int, progress: Callable[[int], None]) -> None:
        """Optuna's own loop, which sends heartbeats, and queues the points of workers that are silent again."""

        def objective(trial: Any) -> Any:
            return self._values(trial, self._begin(trial))

        while (done := len(finished(self.study))) < count:
            progress(done)
            self.study.optimize(objective, n_trials=1, catch=(UserError,))
        progress(done)

    def _sampler(self, seed: int) -> Any:
        from optuna import samplers

        if self.settings.sampler == "random":
            return samplers.RandomSampler(seed)
        return samplers.NSGAIISampler(seed=seed) if self.settings.sampler == "nsga2" else samplers.TPESampler(seed=seed)

    def _points_of(self, folder: Path) -> list[Point]:
        files = sorted(folder.glob("best-*.json"))
        if not files:
            raise UserError(f"{folder}: holds no best-1.json of a search to start from")
        points = []
        for path in files:
            try:
                points.append(self.space.encode(read_model_file(path)[1]["specification"]))
            except (KeyError, ValueError) as error:
                raise UserError(f"{path}: is no point of the space {self.settings.space} ({error})") from error
        return points

    def _own_seed(self) -> int:
        """Another one for each worker, by the order in which they come: with the same one they would draw alike."""
        if self.storage:  # whose machines do not share the folder's lock
            return random.SystemRandom().randrange(2**32)
        before = self.study.user_attrs.get("joined", 0)
        self.study.set_user_attr("joined", before + 1)
        return self.settings.seed + 7919 * before

    def _check_settings(self) -> None:
        settings = asdict(self.settings)
        if self.proxy:
            settings |= {name: value for name, value in vars(self.proxy).items() if name != "workers"}
            both = {"data": self.proxy.data, "validation": self.proxy.validation}
            settings |= {name: data and str(data.json_file) for name, data in both.items()}
        settings = json.loads(json.dumps(settings))
        before = self.study.user_attrs.get("settings")
        if before is None:
            self.study.set_user_attr("settings", settings)
            return
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                differing = f"{name} {before.get(name)}, not {settings.get(name)}"
                raise UserError(f"the search in {self.folder} has {differing}: give it the same, or another --output")
