"""Another project's own tests, run with torchvision as it is, and then with this package in its place.

    python -m tests.other_suites torchvision CHECKOUT    its tests of RetinaNet, NMS and the focal loss
    python -m tests.other_suites deepforest CHECKOUT     all of its tests; its detector is a torchvision RetinaNet

CHECKOUT is a folder with the project's source, and what its tests import must be installed. Nothing is fetched: what
needs the network fails in both runs. Whatever ends otherwise in the second run than in the first is printed; the exit
code is 1 if a test that passes with torchvision does not pass with this package. Since this package's models cannot be
scripted, torchvision's check of that is left out of both runs.
"""

import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_ROOT = Path(__file__).parents[1]
_SUITES = {
    "torchvision": [
        *(f"test/{name}.py" for name in ("test_models", "test_extended_models", "test_ops")),
        *("test/test_models_detection_negative_samples.py", "-k", "retinanet or nms or focal"),
    ],
    "deepforest": ["tests"],
}


def put_in_place() -> None:
    """Put this package's RetinaNet, builders and operations where torchvision has its own."""
    import torchvision
    from torchvision.models import _api, detection

    import retina_fast

    detection.RetinaNet = detection.retinanet.RetinaNet = retina_fast.RetinaNet
    for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"):
        builder = _at_home(getattr(retina_fast, name), detection.retinanet.__name__)
        _api.BUILTIN_MODELS[name] = builder
        for module in (detection, detection.retinanet):
            setattr(module, name, builder)
    for name in ("nms", "batched_nms", "sigmoid_focal_loss"):
        for place in (torchvision.ops, torchvision.ops.boxes, torchvision.ops.focal_loss):
            if hasattr(place, name):
                setattr(place, name, getattr(retina_fast.ops, name))


def _at_home(builder: Callable[..., Any], module: str) -> Callable[..., Any]:
    """The builder under the name of another module, by which torchvision lists its models."""

    @functools.wraps(builder)
    def same(*args: Any, **kwargs: Any) -> Any:
        return builder(*args, **kwargs)

    same.__module__ = module
    return same


class _Unscripted:
    """A plugin of pytest that leaves out torchvision's check that a model can be scripted."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            if hasattr(getattr(item, "module", None), "_check_jit_scriptable"):
                item.module._check_jit_scriptable = lambda *args, **kwargs: None


def _refuse_network() -> None:
    resolve: Any = socket.getaddrinfo

    def local_only(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
            raise socket.gaierror(f"these tests fetch nothing, not from {host!r}")
        return resolve(host, *args, **kwargs)

    socket.getaddrinfo = local_only


def _outcomes(suite: str, checkout: Path, place: str) -> dict[str, str]:
    """The outcome of each test: passed, skipped, or the first line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [str(checkout / "src"), os.environ.get("PYTHONPATH", "")]
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONHASHSEED": "0"}
        command = [sys.executable, __file__, place, *_SUITES[suite], "-q", "--no-header", "-p", "no:cacheprovider"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=checkout, env=os.environ | offline, check=False)
        if not report.exists():
            sys.exit(f"{checkout}: pytest did not come to its end there")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            words = "passed" if wrong is None else f"{wrong.tag}: {(wrong.get('message') or '').splitlines()[:1]}"
            found[f"{case.get('classname')}::{case.get('name')}"] = words
        return found


def main() -> None:
    """Runs the suite twice, prints what differs, and how many tests ended how."""
    suite, checkout = sys.argv[1], Path(sys.argv[2]).resolve()
    theirs, ours = (_outcomes(suite, checkout, place) for place in ("torchvision", "retina_fast"))
    for name, found in (("torchvision", theirs), ("retina_fast", ours)):
        print(f"{name}: {dict(Counter(words.partition(':')[0] for words in found.values()))}")
    lost = {name for name, words in theirs.items() if words == "passed" != ours.get(name)}
    for name in sorted(theirs.keys() | ours.keys()):
        pair = [(found.get(name) or "missing") for found in (theirs, ours)]
        if pair[0].partition(":")[0] != pair[1].partition(":")[0]:
            print(f"{name}\n    torchvision: {pair[0]}\n    retina_fast: {pair[1]}")
    if "passed" not in theirs.values():
        sys.exit("not one test passes with torchvision: nothing is compared")
    sys.exit(1 if lost else 0)


def _run() -> None:
    """One run of pytest in the other project, in a process of its own."""
    import pytest

    sys.path[:1] = []  # this file's folder, which has modules of the names of theirs
    sys.path.append(str(_ROOT))
    import torchvision  # noqa: F401  the one that is installed, and not the checkout's, which is not built

    _refuse_network()
    if sys.argv[1] == "retina_fast":
        put_in_place()
    sys.exit(pytest.main(sys.argv[2:], plugins=[_Unscripted()]))


if __name__ == "__main__":
    main() if sys.argv[1] in _SUITES and len(sys.argv) == 3 else _run()
