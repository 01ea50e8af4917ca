"""Another project's own tests, run with torchvision as it is, and then with this package in its place.

    python -m tests.other_suites torchvision CHECKOUT    its tests of RetinaNet, NMS and the focal loss
    python -m tests.other_suites deepforest CHECKOUT     all of its tests; its detector is a torchvision RetinaNet

Arguments of pytest may follow, in place of these tests. CHECKOUT is a folder with the project's source, and what its
tests import must be installed. Nothing is fetched: what needs the network fails in both runs. Where DeepForest would
download weights of a detector or a ResNet, it finds random ones, the same in both runs, so that tests which look at
what the real ones find fail in both. Since this package's models cannot be scripted, torchvision's check of that is
left out of both runs.

Whatever ends otherwise in the second run than in the first is printed. The exit code is 1 if a test that passes with
torchvision does not pass with this package.
"""

import argparse
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


def _random_weights(folder: Path) -> None:
    """Put random weights where DeepForest's downloads would be kept: COCO's, ImageNet's, and its detector's."""
    import torch
    from deepforest.models.retinanet import RetinaNetHub
    from torchvision.models import ResNet18_Weights, ResNet50_Weights, detection, resnet18, resnet50

    torch.manual_seed(0)
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    coco = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    networks = {
        detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1: coco,
        **dict.fromkeys(ResNet18_Weights, resnet18()),
        **dict.fromkeys(ResNet50_Weights, resnet50()),
    }
    for weights, network in networks.items():
        torch.save(network.state_dict(), checkpoints / weights.url.rpartition("/")[2])
    trees = RetinaNetHub(backbone_weights="COCO_V1", num_classes=1, label_dict={"Tree": 0})
    torch.nn.init.zeros_(trees.head.classification_head.cls_logits.bias)  # so that it finds something
    repository = folder / "hub" / "models--weecology--deepforest-tree"
    trees.save_pretrained(repository / "snapshots" / "random")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("random")


def _child(checkout: Path, folder: Path, *arguments: str) -> None:
    """This file again, in a process of its own in the other project, with `folder` for what it would download."""
    paths = os.pathsep.join(filter(None, [str(checkout / "src"), os.environ.get("PYTHONPATH", "")]))
    places = {"PYTHONPATH": paths, "TORCH_HOME": str(folder / "torch"), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, __file__, *arguments], cwd=checkout, env=os.environ | places, check=False)


def _outcomes(checkout: Path, folder: Path, mode: str, *arguments: str) -> dict[str, str]:
    """The outcome of each test: passed, skipped, or the first line of what went wrong."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    quiet = ("-q", "-o", "addopts=", "--no-header", "-p", "no:cacheprovider", f"--junitxml={report}")
    _child(checkout, folder, mode, *arguments, *quiet)
    if not report.exists():
        sys.exit(f"{checkout}: pytest did not come to its end there")
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        words = "passed" if wrong is None else f"{wrong.tag}: {(wrong.get('message') or '').partition(chr(10))[0]}"
        found[f"{case.get('classname')}::{case.get('name')}"] = words
    return found


def main() -> None:
    """Runs the suite twice, prints what differs, and how many tests ended how."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(_SUITES))
    parser.add_argument("checkout", type=Path, help="a folder with the project's source")
    options, of_pytest = parser.parse_known_args()
    suite, checkout, arguments = options.suite, options.checkout.resolve(), of_pytest or _SUITES[options.suite]
    if not checkout.is_dir():
        parser.error(f"{options.checkout}: no such folder")
    with tempfile.TemporaryDirectory() as name:
        if suite == "deepforest":
            _child(checkout, Path(name), "--weights", name)
        theirs, ours = (_outcomes(checkout, Path(name), mode, *arguments) for mode in ("--as-it-is", "--in-place"))
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
    """What a child does: one run of pytest in the other project, or the weights for both."""
    import pytest

    sys.path[:1] = []  # this file's folder, which has modules of the names of theirs
    sys.path.append(str(_ROOT))
    import torchvision  # noqa: F401  the one that is installed, and not the checkout's, which is not built

    _refuse_network()
    if sys.argv[1] == "--weights":
        return _random_weights(Path(sys.argv[2]))
    if sys.argv[1] == "--in-place":
        put_in_place()
    sys.exit(pytest.main(sys.argv[2:], plugins=[_Unscripted()]))


if __name__ == "__main__":
    _run() if sys.argv[1:2] in (["--weights"], ["--as-it-is"], ["--in-place"]) else main()
