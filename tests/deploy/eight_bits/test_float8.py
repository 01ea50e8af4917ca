"""Engines whose 1x1 convs may compute in FP8, on a CPU, where `torch._scaled_mm` runs, too."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torchvision.io import ImageReadMode, decode_image

from retina_fast import compile_inference
from retina_fast.data.errors import UserError
from retina_fast.deploy.eight_bits import float8
from retina_fast.deploy.eight_bits.float8 import calibrate_float8, everywhere, float8_convs, input_factor
from retina_fast.deploy.fusion import layers
from retina_fast.deploy.simulate import simulate_float8
from retina_fast.device import has_float8
from retina_fast.kernels.conv_float8 import float8_weight
from retina_fast.predict.load import TREES, load_model
from tests.deploy.eight_bits.bottlenecks import bottleneck_model, convs_of
from tests.deploy.engine_soak import small_model
from tests.deploy.export.test_export import PHOTO
from tests.deploy.pictures import images
from tests.instruments.exported import crops

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:the engine detects differently", "ignore:calibrated with 2 images", "ignore:the model finds 5"
    ),
]

F8 = torch.float8_e4m3fn
GPU = torch.cuda.is_available() and has_float8(torch.device("cuda"))


@pytest.fixture
def model():
    return bottleneck_model()


@pytest.fixture
def with_float8(monkeypatch):
    """A CPU passes for a device that has it."""
    monkeypatch.setattr(float8, "has_float8", lambda device: True)


@pytest.fixture
def pictures():
    return images(*[(40, 50)] * 8)


def measured(engine):
    report = engine.report
    assert report.float8
    assert report.difference
    return report.float8, report.difference.scores


# Calibration


def test_the_factor_is_one_where_it_can_be():
    for largest in (2.0, 20.0, 112.0, 0.0):
        assert input_factor(largest) == 1
    for largest in (1e-30, 0.01, 1.99, 112.1, 500.0, 3e38):
        factor = input_factor(largest)
        assert 2 <= factor * largest <= 112
        assert factor.hex().startswith("0x1.0000")
    assert input_factor(1.5) == 2
    assert input_factor(113.0) == 0.5


def test_each_conv_is_calibrated_on_what_it_reads(model, pictures):
    """The merged downsampling conv too, which no call of its own shows; and only one image is held."""
    own = compile_inference(model, dtype=torch.float32).model
    own.backbone.stem[0].weight.mul_(100)
    own.backbone.stem[0].bias.mul_(100)
    given: list[weakref.ref[torch.Tensor]] = []

    def streamed():
        for picture in pictures:
            assert sum(reference() is not None for reference in given) <= 1
            image = picture.clone()
            given.append(weakref.ref(image))
            yield image
            del image

    assert calibrate_float8(own, streamed()) == (9, 8)
    first, second, third = own.backbone.chain
    factors = {conv: conv.float8_factor or 0.0 for conv in float8_convs(own)}
    lateral = [block[0] for block in own.backbone.pyramid.inner_blocks]
    pairs = [(block.conv1, block.conv3) for block in (first, second, third)]
    assert factors.keys() == {first.downsample[0], *lateral, *(conv for pair in pairs for conv in pair)}
    assert first.merges_downsample
    assert factors[first.conv1] == factors[first.downsample[0]] == factors[lateral[0]] < 1
    assert min(factors.values()) > 0
    assert all(conv.float8_factor is None for conv in convs_of(own) if not conv.is_pointwise())
    assert not any(conv._forward_pre_hooks for conv in convs_of(own))


@pytest.mark.usefixtures("with_float8")
def test_bad_images_are_refused(model, pictures):
    for given, message in (
        ([], "the images for calibration must be at least one, got none"),
        ([torch.zeros(3, 40, 50)], "the image for calibration must show something"),
        ([torch.full((3, 40, 50), 2.0)], r"calibration image 0 must be floating point in \[0, 1\]"),
    ):
        for make in (simulate_float8, lambda model, given: compile_inference(model, given, dtype=F8)):
            with pytest.raises(UserError, match=message):
                make(model, given)
    with pytest.warns(UserWarning, match="calibrated with 2 images alone"):
        simulate_float8(model, pictures[:2], torch.float32)
    nn.init.constant_(model.backbone.stem[0].weight, torch.inf)
    with pytest.raises(UserError, match=r"make the input of backbone.* (inf|nan): check the model"):
        simulate_float8(model, pictures, torch.float32)


@pytest.mark.usefixtures("with_float8")
def test_a_model_without_such_convs_is_refused(pictures):
    with pytest.raises(UserError, match=r"dtype=torch.float8_e4m3fn: the model has no 1x1 conv with channels in mult"):
        compile_inference(small_model().cpu(), pictures, dtype=F8)


@pytest.mark.parametrize(
    ("kind", "hip", "capability", "found"),
    [
        ("cpu", None, None, "the model is on cpu: "),
        ("cuda", None, (8, 0), r"the model is on cuda \(A GPU, 8\.0\)"),
        ("cuda", "7.0", (9, 4), r"the model is on cuda \(A GPU, of AMD\)"),
        ("cuda", None, (8, 9), None),
        ("cuda", None, (10, 0), None),
    ],
)
def test_which_devices_have_it(kind, hip, capability, found, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    if found is None:
        float8.require_float8(torch.device(kind))
        return
    with pytest.raises(UserError, match=f"dtype=torch.float8_e4m3fn needs an NVIDIA GPU of compute .*8.9.*{found}"):
        float8.require_float8(torch.device(kind))


def test_a_cpu_is_refused_before_anything_is_done(model):
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        compile_inference(model.cpu(), [], dtype=F8)


# The engine


@pytest.mark.usefixtures("with_float8")
def test_the_engine_measures_fp8_everywhere_and_the_simulation_is_it(model, pictures):
    engine, simulated = compile_inference(model, pictures, dtype=F8), simulate_float8(model, pictures)
    (ours, our_scores), (theirs, their_scores) = measured(engine), measured(simulated)
    assert (ours.convs, ours.images, ours.simulated, theirs.simulated) == (9, 8, False, True)
    assert ours.kept.images == theirs.kept.images == 8
    assert ours.kept.found == theirs.kept.found > 20
    assert our_scores == pytest.approx(their_scores, rel=0.2)
    exact = compile_inference(model, pictures, dtype=torch.bfloat16)
    assert exact.report.difference
    assert our_scores > 1.5 * exact.report.difference.scores
    text = str(engine)
    assert "RetinaNet engine on cpu: float8_e4m3fn, channels_last" in text
    assert "9 1x1 convs may compute in FP8 (E4M3), calibrated with 8 images" in text
    assert f"with all of them in FP8: {ours.kept}" in text
    assert "9 1x1 convs compute in FP8 (E4M3), simulated, calibrated" in str(simulated)
    # where nothing was found to be faster, the engine computes as one in bfloat16; the simulation does not
    torch.testing.assert_close(engine(pictures[:1]), exact(pictures[:1]), rtol=0, atol=0)
    with everywhere(engine.model, "float8"):
        (found,) = engine(pictures[:1])
    alike = simulated(pictures[:1])
    assert len(alike[0]["scores"]) == len(found["scores"])
    near = alike[0]["labels"][:, None] == found["labels"]  # of any place: rounding orders nearly equal scores
    for key in ("boxes", "scores"):
        ours, theirs = (image[key].reshape(len(image[key]), -1) for image in (alike[0], found))
        near &= torch.isclose(ours[:, None], theirs, rtol=0.05, atol=1e-2).all(dim=2)
    assert near.any(dim=0).all()
    assert near.any(dim=1).all()
    for twin in (copy.deepcopy(simulated), pickle.loads(pickle.dumps(simulated))):
        torch.testing.assert_close(twin(pictures[:1]), alike, rtol=0, atol=0)


@pytest.mark.skipif(not GPU, reason="needs a GPU with FP8")
def test_the_engine_on_a_gpu(model, pictures, tmp_path):
    """With all in FP8 it detects what the simulation does; with the ways that were found the fastest, it runs."""
    model = model.cuda()
    engine = compile_inference(model, pictures, dtype=F8, choices=tmp_path / "choices.json")
    (ours, our_scores), (theirs, their_scores) = measured(engine), measured(simulate_float8(model, pictures))
    assert ours.kept.found == theirs.kept.found > 20
    assert our_scores == pytest.approx(their_scores, rel=0.2)
    assert len(engine(pictures[:2])) == 2
    assert sum(sum(counts.values()) for counts in engine.report.ways.values()) > 9


def test_what_a_trained_detector_loses_and_a_warning(monkeypatch):
    model = load_model(TREES)[0].cpu()
    given = list(crops([decode_image(str(PHOTO), ImageReadMode.RGB)], 8, 64, 96))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine = simulate_float8(model, given, torch.float32)
    report, _ = measured(engine)
    kept = report.kept
    assert report.convs == 5
    assert kept.found > 10
    assert kept.kept >= 0.95 * kept.found
    assert 1e-4 < kept.scores < 0.05
    monkeypatch.setattr(layers, "float8_weight", lambda weight, factor: float8_weight(-weight, factor))
    with pytest.warns(UserWarning, match="the engine detects differently") as caught:
        simulate_float8(model, given[:2], torch.float32)
    (warning,) = (one for one in caught if "the engine detects differently" in str(one.message))
    assert str(warning.message).endswith("give more images for calibration, or compute in bfloat16")
    assert warning.filename == __file__


def test_a_move_to_where_it_is_not_forgets_it(model, pictures, monkeypatch):
    monkeypatch.setattr(float8, "has_float8", lambda device: True)
    engine = compile_inference(model, pictures, dtype=F8)
    assert engine.to("cpu").report.float8
    assert any(conv.float8_factor for conv in convs_of(engine.model))
    engine.to(torch.float16)
    assert engine.report.float8 is None
    assert not any(conv.float8_factor for conv in convs_of(engine.model))
    assert simulate_float8(model, pictures[:2], torch.float32).double().report.float8
