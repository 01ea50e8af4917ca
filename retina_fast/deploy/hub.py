"""Models where the Hugging Face Hub keeps them: a folder or repository with weights, configuration and a model card.

    model.safetensors    the weights
    config.json          the builder with its arguments, the names of the classes, what was measured
    README.md            the model card: what is known, for people and, in its head, for the Hub's search

huggingface_hub and safetensors are imported when they are used. A base class of huggingface_hub's would have to be
imported with this package, so its functions are called instead; the files are those that its mixin writes.
"""

import importlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from retina_fast import checkpoint as model_file
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError, one_line
from retina_fast.data.files import replacing
from retina_fast.data.outputs import check_folder
from retina_fast.deploy.deepforest import deepforest_hub_checkpoint

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_LIBRARY = "retina_fast"

_TEXT = """# {title}

A RetinaNet ([Lin et al. 2017](https://arxiv.org/abs/1708.02002)) of
retina_fast, built by `{builder}`{arguments}.

```python
import retina_fast

model = retina_fast.load("{repository}")
model.predict("photo.jpg").plot()
```

## Classes

{classes}

## Data

{data}

## Metrics

{metrics}
"""


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise UserError(f"the Hub's files need {package}: pip install {package}") from error


def save_pretrained(model: Checkpoint | str | Path, folder: str | Path, *, license: str, data: str = "") -> None:
    """Write a model into a folder as the Hub keeps it.

    Args:
        model: a model file that ``retina-fast train`` wrote, or a :class:`~retina_fast.checkpoint.Checkpoint`: for a
            model of one's own it is made of the builder's name and arguments, the classes and the ``state_dict``.
        folder: it is made if need be. Earlier files of a model are replaced, but a model card that is there stays.
        license: of the weights, by the Hub's name of it: ``mit``, ``apache-2.0``, ``cc-by-4.0``, or ``other``.
        data: a sentence or more on what the model was trained on, for the card.

    Raises:
        UserError: if the model file cannot be read, the folder cannot be written into or holds another library's model,
            license is empty, or a package is not installed.

    Example::

        >>> save_pretrained("runs/mine/model.pt", "street", license="mit")  # doctest: +SKIP
    """
    content, folder = _opened(model), Path(folder)
    _write(content, folder, folder.resolve().name, license, data)


def push_to_hub(
    model: Checkpoint | str | Path,
    repo_id: str,
    *,
    license: str,
    data: str = "",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a model to a repository of the Hub, which is made if need be; returns the address of the commit.

    Args:
        model, license, data: as for :func:`save_pretrained`.
        repo_id: the owner's and the repository's name, ``me/street``.
        private: whether a new repository is private; by default as the owner has set.
        token: the Hub's; by default that of ``hf auth login``.
        revision: the branch; ``main`` by default.

    Raises:
        UserError: as :func:`save_pretrained`, or if the Hub refuses or cannot be reached.

    Example::

        >>> push_to_hub("runs/mine/model.pt", "me/street", license="mit")  # doctest: +SKIP
        'https://huggingface.co/me/street/commit/...'
    """
    hub = _needed("huggingface_hub")
    content = _opened(model)
    with tempfile.TemporaryDirectory() as folder:
        _write(content, Path(folder), repo_id, license, data)
        api = hub.HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload a RetinaNet"
            )
        except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError, OSError) as error:
            raise UserError(f"{repo_id}: the Hub did not take it ({_reason(error)})") from error
    return str(getattr(commit, "commit_url", commit))


def read_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Read a model from a folder that :func:`save_pretrained` wrote, or from a repository of the Hub.

    DeepForest's repositories, such as ``weecology/deepforest-tree``, are read, too.

    Args:
        source: the folder, or the owner's and the repository's name.
        revision: branch, tag or commit of the repository.
        token: the Hub's; by default that of ``hf auth login``.
        cache_dir: where downloaded files are kept.
        local_files_only: whether to take what was downloaded before, and ask nobody.

    Raises:
        UserError: if there are no such files, they are damaged or no model of this package; or a package is not
            installed.

    Example::

        >>> read_pretrained("mine").build().eval()  # doctest: +SKIP
    """
    folder = Path(source)
    if folder.is_dir():
        files = [folder / name for name in (CONFIG, WEIGHTS)]
        for file in files:
            if not file.is_file():
                raise UserError(f"{folder}: is a folder without {file.name}, so it holds no model")
    else:
        hub = _needed("huggingface_hub")
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        try:
            files = [
                Path(hub.hf_hub_download(str(source), name, local_files_only=local_files_only, **options))
                for name in (CONFIG, WEIGHTS)
            ]
        except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(f"{source}: neither a folder nor a model of the Hub ({_reason(error)})") from error
    return _read(*files)


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}".splitlines()[0])


def _opened(model: Checkpoint | str | Path) -> Checkpoint:
    if isinstance(model, str | Path):
        return model_file.load(model)
    if not isinstance(model, Checkpoint):
        kind = type(model).__qualname__
        raise TypeError(f"model must be a model file, or a Checkpoint with the model's state_dict, got {kind}")
    return model_file.plain(model)


def _write(content: Checkpoint, folder: Path, repository: str, license: str, data: str) -> None:
    safetensors = _needed("safetensors.torch")
    if not isinstance(license, str) or not license.strip():
        raise UserError("license must name the licence of the weights, such as 'mit', or be 'other'")
    check_folder(folder, (WEIGHTS, CONFIG, CARD))
    if (folder / CONFIG).exists() and _config(folder / CONFIG).get("library_name") != _LIBRARY:
        raise UserError(f"{folder / CONFIG}: is of a model of another library; give another folder")
    if (folder / WEIGHTS).exists() and not (folder / CONFIG).exists():
        raise UserError(f"{folder / WEIGHTS}: is there already, without {CONFIG}; give another folder")
    card = None if (folder / CARD).exists() else _card(content, repository, license, data)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in content.state_dict.items()}
    with replacing(folder / WEIGHTS) as partial:
        safetensors.save_file(weights, partial, metadata={"format": "pt"})
    described = {"library_name": _LIBRARY, "version": model_file.VERSION, **vars(replace(content, state_dict={}))}
    del described["state_dict"]
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    if card is not None:
        with replacing(folder / CARD) as partial:
            partial.write_text(card, encoding="utf-8")


def _card(content: Checkpoint, repository: str, license: str, data: str) -> str:
    """The model card, with what is known."""
    hub = _needed("huggingface_hub")
    head = hub.ModelCardData(
        library_name=_LIBRARY, license=license, pipeline_tag="object-detection", tags=["object-detection", "retinanet"]
    )
    arguments = ", ".join(f"`{name}={value!r}`" for name, value in content.kwargs.items())
    text = _TEXT.format(
        title=repository.rpartition("/")[2],
        builder=content.builder,
        arguments=f" with {arguments}" if arguments else "",
        repository=repository,
        classes=", ".join(content.classes),
        data=data or "Not said.",
        metrics="\n".join(f"- {name}: {value:.4g}" for name, value in content.metrics.items()) or "None were given.",
    )
    return f"---\n{head}\n---\n\n{text}"


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({_reason(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: must be a JSON object, got {type(config).__name__}")
    return config


def _read(config_file: Path, weights_file: Path) -> Checkpoint:
    config = _config(config_file)
    try:
        state = _needed("safetensors.torch").load_file(weights_file)
    except Exception as error:  # safetensors has an error of its own for each of its parts
        raise UserError(f"{weights_file}: damaged, or no file of weights ({_reason(error)})") from error
    if config.get("library_name") != _LIBRARY:
        return _of_another_library(config, config_file, state)
    return model_file.checked(config | {"state_dict": state}, config_file)


def _of_another_library(config: dict[str, Any], file: Path, state: dict[str, Any]) -> Checkpoint:
    if not {"label_dict", "num_classes"} <= config.keys():
        raise UserError(f"{file}: is of no model of this package, nor of DeepForest")
    try:
        return deepforest_hub_checkpoint(config, state)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
