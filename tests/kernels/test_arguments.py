"""What public operations refuse or convert before a kernel reads it."""

import pytest
import torch

from retina_fast.kernels import image_batch, sigmoid_focal_loss
from retina_fast.kernels.arguments import check_devices, check_integers, check_shape, loss_normalizers
from retina_fast.kernels.dispatch import runs_triton
from retina_fast.kernels.greedy_nmm import greedy_nmm
from retina_fast.kernels.levels import flatten_all
from tests.instruments.fake_gpu import launches_of
from tests.kernels.every_operation import MODULES, arguments, by_kernels, call, leaves

DTYPES = [torch.float32, torch.int32, torch.int64, torch.float64, torch.bfloat16, torch.float16]
TENSORS = [
    (name, key)
    for name, keywords in arguments().items()
    for key, value in keywords.items()
    if isinstance(value, torch.Tensor)
]
INTEGERS = [
    (name, key) for name, key in TENSORS if "size" not in key and not arguments()[name][key].is_floating_point()
]
MATCHED = ("box_loss", "box_quality", "distribution_loss")
SHAPES = [(name, key) for name, key in TENSORS if "matching" not in name or key != "offsets"]


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_a_tensor_on_another_device_is_named(name, key):
    """On fake tensors, so that a machine without a GPU tests it; a kernel would read a host address."""

    def run(made):
        keywords = made[name]
        keywords[key] = torch.empty(keywords[key].shape, dtype=keywords[key].dtype)
        if key == next(iter(keywords)):  # the one that the others are compared with
            with pytest.raises(ValueError, match="must be on cpu as the other arguments are, got cuda"):
                call(name, keywords)
        elif key == "normalizers":
            with pytest.raises(RuntimeError, match="copies between"):  # converted, with a copy
                call(name, keywords)
        else:
            with pytest.raises(ValueError, match=f"{key} must be on cuda:0 as the other arguments are, got cpu"):
                call(name, keywords)

    launches_of(run, lambda: arguments("cuda"))


@pytest.mark.parametrize(("name", "key"), INTEGERS)
def test_numbers_that_are_no_integers_are_named(name, key):
    keywords = arguments()[name]
    keywords[key] = keywords[key].float()
    with pytest.raises(ValueError, match=f"{key} must be integers, got torch.float32"):
        call(name, keywords)


@pytest.mark.parametrize(("name", "key"), SHAPES)
def test_a_shape_that_does_not_fit_is_named(name, key):
    """A kernel would read beyond the end of a tensor."""
    keywords = arguments()[name]
    short = keywords[key][:-1] if key in ("index", "positions") else keywords[key][..., :-1]
    keywords[key] = short
    with pytest.raises(ValueError, match=rf"{key}.*\({short.shape[0]}.*"):
        call(name, keywords)


@pytest.mark.parametrize("name", ["box_loss", "box_decode", "box_quality", "distribution_loss"])
@pytest.mark.parametrize("change", ["shorter", "one of two images"])
def test_anchors_of_another_number_are_refused(name, change):
    keywords = arguments()[name]
    anchors = keywords["anchors"]
    keywords["anchors"] = anchors[:-1] if change == "shorter" else anchors[None]
    expected = r"\(7, 4\)" if change == "shorter" else r"\(1, 8, 4\)"
    with pytest.raises(ValueError, match=rf"anchors must be .* = \(8, 4\) or \(2, 8, 4\), got {expected}"):
        call(name, keywords)


@pytest.mark.parametrize(
    ("name", "key", "values", "message"),
    [
        ("anchor_matching", "offsets", [0, 3, 2], r"offsets must rise from 0 to at most the 3 boxes, got \[0, 3, 2\]"),
        ("anchor_matching", "offsets", [0, 2, 4], r"offsets must rise from 0 to at most the 3 boxes, got \[0, 2, 4\]"),
        ("atss_matching", "offsets", [-1, 2, 3], r"offsets must rise from 0 to at most the 3 boxes, got \[-1, 2, 3\]"),
        (
            "task_aligned_matching",
            "offsets",
            [0, 2, 4],
            r"offsets must rise from 0 to at most the 3 boxes, got \[0, 2, 4\]",
        ),
        ("task_aligned_matching", "labels", [2, 3, 1], r"labels must be in \[0, num_classes = 3\), got 3"),
        ("batched_nms", "counts", [8, -1], "counts must be at least 0, got -1 for image 1"),
        ("greedy_nmm", "counts", [-2, 5], "counts must be at least 0, got -2 for image 0"),
        ("focal_loss", "labels", [[-1, 0, 3, -2, 1, 1, 1, 1]] * 2, "labels must be below num_classes = 3, got 3"),
        ("soft_focal_loss", "labels", [[0] * 7 + [9]] * 2, "labels must be below num_classes = 3, got 9"),
        *(
            (name, key, values, message)
            for name in MATCHED
            for key, values, message in (
                ("indices", [[0, 1, 2, -1, -2, 0, 0, 0], [-1] * 8], "below the 2 ground truths of image 0, got 2"),
                ("indices", [[-1] * 8, [0, 0, 0, -7, 99, -1, 1, 0]], "below the 1 ground truths of image 1, got 99"),
                ("offsets", [0, 2, 4], r"offsets must rise from 0 to at most the 3 boxes, got \[0, 2, 4\]"),
                ("offsets", [0, 2, 2], "below the 0 ground truths of image 1, got 0"),
            )
        ),
    ],
)
def test_values_that_cannot_be_are_named_on_a_cpu(name, key, values, message):
    """Kernels clamp or mask what they can; looking at the values would make the host wait for a GPU."""
    keywords = arguments()["batched_nms" if name == "greedy_nmm" else name] | {key: torch.tensor(values)}
    with pytest.raises(ValueError, match=message):
        greedy_nmm(**keywords) if name == "greedy_nmm" else call(name, keywords)


@pytest.mark.parametrize("name", MATCHED)
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("indices", [[2, -1, -2, 1, -1, -1, 1, 0], [-1, 0, -1, -1, -2, -1, -1, 1 << 30]]),
        ("offsets", [0, 1, 1 << 30]),
        ("offsets", [-5, 1, 3]),
    ],
)
def test_an_index_beyond_the_ground_truths_gives_nan_on_a_gpu(name, key, values, device):
    """The kernels read nothing there, and the anchors of other ground truths keep their loss and gradient."""
    keywords = arguments()[name]
    keywords[key] = torch.tensor(values)
    levels = keywords["distributions" if name == "distribution_loss" else "deltas"]
    first, stop = keywords["offsets"][:-1, None], keywords["offsets"][1:, None].clamp(max=3)
    beyond = (keywords["indices"] >= 0) & ((first < 0) | (keywords["indices"] >= stop - first))
    assert 0 < beyond.sum() < (keywords["indices"] >= 0).sum()
    known = keywords | {"indices": keywords["indices"].masked_fill(beyond, -1)}
    if name == "box_quality":
        ours, expected = by_kernels(name, keywords, device), by_kernels(name, known, device)
        assert torch.equal(ours.isnan(), beyond)
        assert torch.equal(ours[~beyond], expected[~beyond])
        return
    for level in levels:
        level.requires_grad_()
    ours, expected = by_kernels(name, keywords, device), by_kernels(name, known, device)
    assert ours.isnan()
    assert expected.isfinite()
    channels = levels[0].shape[1] // 2
    ours, expected = (torch.cat(flatten_all(torch.autograd.grad(x, levels), channels), 1) for x in (ours, expected))
    assert torch.equal(ours[~beyond], expected[~beyond])


@pytest.mark.parametrize("name", MATCHED)
def test_any_negative_index_is_no_foreground(name, device):
    keywords = arguments()[name]
    other = keywords | {"indices": torch.where(keywords["indices"] < 0, -99, keywords["indices"])}
    assert torch.equal(call(name, other), call(name, keywords))
    assert torch.equal(by_kernels(name, other, device), by_kernels(name, keywords, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["focal_loss", "soft_focal_loss", "box_loss", "distribution_loss"])
def test_normalizers_of_any_dtype(name, dtype, device):
    keywords = arguments()[name]
    expected = call(name, keywords)
    keywords["normalizers"] = keywords["normalizers"].to(dtype)
    torch.testing.assert_close(call(name, keywords), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_kernels(name, keywords, device), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["focal_loss", "soft_focal_loss", "box_loss", "distribution_loss"])
def test_a_kernel_is_given_normalizers_in_float32(name, dtype):
    """Inline PTX would take the bits of an int32 as a float32, a number near 0. The interpreter does not."""

    def run(made):
        call(name, {**made[name], "normalizers": torch.empty(2, dtype=dtype, device="cuda")})

    given = [arg for launch in launches_of(run, lambda: arguments("cuda")) for arg in launch.args]
    assert {arg.dtype for arg in given if isinstance(arg, torch.Tensor) and arg.shape == (2,)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize(
    ("name", "keys"),
    [("anchor_matching", ("anchors", "boxes")), ("atss_matching", ("anchors", "boxes")),
     ("task_aligned_matching", ("anchors", "boxes")),
     ("box_loss", ("anchors", "boxes")), ("box_quality", ("anchors", "boxes")), ("box_decode", ("anchors",)),
     ("distribution_loss", ("anchors", "boxes")),
     ("take_kept", ("boxes",)), ("batched_nms", ("boxes",))],
)  # fmt: skip
def test_geometry_of_another_dtype_is_read_as_float32(name, keys, dtype, device):
    keywords = arguments()[name]
    for key in keys:
        keywords[key] = keywords[key].round()
    expected = leaves(call(name, keywords))
    for key in keys:
        keywords[key] = keywords[key].to(dtype)
    if name not in ("take_kept", "batched_nms") or dtype != torch.float64:  # which keep float64, by the reference
        for ours, exact in zip(leaves(by_kernels(name, keywords, device)), expected, strict=True):
            assert ours.dtype == exact.dtype
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(leaves(call(name, keywords)), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_default_dtype_of_bfloat16_changes_no_loss(device):
    keywords = arguments()
    before = {name: call(name, keywords[name]) for name in ("focal_loss", "box_loss")}
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = {name: by_kernels(name, keywords[name], device) for name in ("focal_loss", "box_loss")}
    finally:
        torch.set_default_dtype(torch.float32)
    for name, loss in before.items():
        torch.testing.assert_close(after[name], loss, rtol=1e-5, atol=0)


def test_levels_that_do_not_belong_together():
    keywords = arguments()["focal_loss"]
    first, second = keywords["logits"]
    for levels, message in (
        ([first, second.half()], "levels must share a dtype"),
        ([first, second[:1]], "levels must share a batch size"),
        ([first, second.to("meta")], "levels must share a device"),
        ([], "at least one level"),
    ):
        with pytest.raises(ValueError, match=message):
            call("candidate_selection", {"logits": levels, "num_classes": 3})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, given in arguments().items()
        for key in ("logits", "deltas", "distributions")
        if key in given
    ],
)
def test_no_level_is_named(name, key):
    with pytest.raises(ValueError, match="levels must hold at least one level"):
        call(name, arguments()[name] | {key: []})


def test_an_image_on_another_device_is_named():
    """Its address would go into a table that the GPU reads."""

    def run():
        images = [torch.empty(3, 4, 4, device="cuda"), torch.empty(3, 4, 4)]
        with pytest.raises(ValueError, match=r"images\[1\] must be on cuda:0 as images\[0\] is, got cpu"):
            image_batch.image_batch(images, [(4, 4)] * 2, (0.5,), (0.2,))
        with pytest.raises(ValueError, match="out must be on cuda:0 as the images are, got cpu"):
            image_batch.image_batch(images[:1], [(4, 4)], (0.5,), (0.2,), 4, torch.empty(1, 3, 4, 4))

    launches_of(run)


def test_which_path_runs():
    """Kernels on a GPU, in the dtypes they read."""
    seen = []

    def run():
        dtypes = torch.float32, torch.bfloat16, torch.float16
        on_gpu = [torch.empty(2, dtype=dtype, device="cuda") for dtype in dtypes]
        seen.append(runs_triton(*on_gpu, None))
        seen.append(runs_triton(on_gpu[0], torch.empty(2, dtype=torch.float64, device="cuda")))
        seen.append(runs_triton(on_gpu[0], torch.empty(2)))

    launches_of(run)
    assert seen == [True, False, False]
    assert not runs_triton(torch.empty(2))


@pytest.mark.parametrize("name", [*MODULES, "sigmoid_focal_loss"])
def test_every_operation_launches_its_kernels_on_a_gpu(name):
    def run(made):
        if name == "sigmoid_focal_loss":
            sigmoid_focal_loss.sigmoid_focal_loss(torch.empty(7, device="cuda"), torch.empty(7, device="cuda"))
        else:
            call(name, made[name])

    assert launches_of(run, lambda: arguments("cuda"))


def test_the_checks_by_themselves():
    x = torch.zeros(2, 3)
    check_devices(x.device, x=x, absent=None)
    check_integers(x=x.int(), absent=None)
    check_shape("x", x, "(B, N)", (2, 3))
    with pytest.raises(ValueError, match=r"x must be \(B, N\) = \(3, 2\) or \(2,\), got \(2, 3\)"):
        check_shape("x", x, "(B, N)", (3, 2), (2,))
    assert loss_normalizers(x[:, 0].double(), 2, x).dtype == torch.float32
    assert loss_normalizers(x[:, 0].int(), 2, x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"normalizers must be \(B,\) = \(2,\), got \(\)"):
        loss_normalizers(torch.tensor(3.0), 2, x)


def test_custom_ops_have_no_default_arguments():
    """PyTorch 2.11 asks backward for no gradient of an argument that was given its default."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("retina_fast::")]
    schemas = [getattr(torch.ops.retina_fast, name.split("::")[1]).default._schema for name in names]
    assert len(schemas) > 20
    assert not [s.name for s in schemas if any(argument.has_default_value() for argument in s.arguments)]
