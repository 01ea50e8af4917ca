"""SpineNet against the published figures, its rules by their effect, and specifications of all kinds."""

import contextlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import retina_fast
from demo import permutation
from retina_fast import forward
from retina_fast.backbones.specification import MOBILE_SPINENET, SPINENET, Block, added_raw, checked
from retina_fast.backbones.spinenet import SIZES, SpineNet
from retina_fast.builders import MODELS
from retina_fast.heads import run_head

# The paper's table once more, as (level, kind, parents), blocks 2 to 16; P3..P7 are blocks 13, 12, 14, 16, 15.
TABLE = """2 bottleneck 0 1; 4 residual 0 1; 3 bottleneck 2 3; 4 bottleneck 2 4; 6 residual 3 5; 4 bottleneck 3 5;
5 residual 6 7; 7 residual 6 8; 5 bottleneck 8 9; 5 bottleneck 8 10; 4 bottleneck 5 10; 3 bottleneck 4 10;
5 bottleneck 7 12; 7 bottleneck 5 14; 6 bottleneck 12 14"""
OUTPUTS = {"p3": 13, "p4": 12, "p5": 14, "p6": 16, "p7": 15}

PUBLISHED = {  # parameters of detector and backbone, billions of multiply-adds at the published size
    "49s": (11_944_598, 9_472_959, 33.8),
    "49": (28_543_383, 21_831_488, 85.4),
    "96": (42_974_871, 36_262_976, 265.4),
    "143": (66_959_511, 60_247_616, 524.0),
    "190": (163_637_351, 126_587_664, 1885.0),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def tiny(**kwargs: Any) -> SpineNet:
    kwargs = {"width": 0.05, "out_channels": 8, **kwargs}
    return SpineNet(**kwargs)


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "size", [pytest.param(x, marks=pytest.mark.slow if x in ("143", "190") else ()) for x in SIZES]
)
def test_published_parameters_and_multiply_adds(size):
    with torch.device("meta"):
        model = MODELS[f"retinanet_spinenet{size}"]().eval()
        side = model.transform.max_size
        assert (trainable(model), trainable(model.backbone)) == PUBLISHED[size][:2]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            levels = model.backbone(torch.empty(1, 3, side, side))
            run_head(model.head, list(levels.values()))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[size][2], rel=0.003)


def test_the_published_specification():
    rows = [row.split() for row in TABLE.split(";")]
    for block, (level, kind, *parents) in zip(SPINENET, rows, strict=True):
        assert block[:3] == (int(level), kind, tuple(map(int, parents)))
    assert {f"p{block.level}": row + 2 for row, block in enumerate(SPINENET) if block.is_output} == OUTPUTS
    assert checked(SPINENET) == SPINENET


def test_every_block_sees_its_parents_and_the_block_that_nobody_uses():
    """Recomputed from the outputs of the blocks, by the table above: links, the raw sum, where the activation is."""
    net: Any = tiny().double().eval()
    for module in net.modules():  # with fresh statistics, the deep maps are nearly constant
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn_like(module.weight)
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def note(number: int):
        def hook(module, arguments, output):
            inputs[number], outputs[number] = arguments[0], output

        return hook

    for number, group in enumerate(net.blocks):
        group.register_forward_hook(note(number))
    levels = net(torch.rand(1, 3, 256, 128, dtype=torch.float64))
    torch.testing.assert_close(inputs[1], outputs[0])
    for number, row in enumerate(TABLE.split(";"), start=2):
        a, b = (link(outputs[int(parent)]) for link, parent in zip(net.links[number - 2], row.split()[2:], strict=True))
        merged = a + b
        if number == 14:
            merged = merged + outputs[11]
        torch.testing.assert_close(inputs[number], merged.relu())
        assert (merged < 0).any(), "the links end without an activation"
    for name, number in OUTPUTS.items():
        torch.testing.assert_close(levels[name], net.outputs[name[1]](outputs[number]))
        assert (levels[name] >= 0).all()


def test_block_11_reaches_the_output_through_block_14_alone():
    net: Any = tiny().eval()
    images = torch.rand(1, 3, 128, 128)
    before = net(images)
    handle = net.blocks[11].register_forward_hook(lambda module, x, y: y + 1)
    after = net(images)
    handle.remove()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"p5", "p6", "p7"}  # P6 and P7 come after P5; P3 and P4 before
    torch.stack([level.sum() for level in net(images).values()]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.blocks[11][0].branch[0].parameters())
    net.zero_grad()
    net.added_raw[12] = ()
    torch.stack([level.sum() for level in net(images).values()]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.blocks[11].parameters())


def test_the_rule_of_unused_blocks_is_general():
    rows = list(SPINENET)
    assert [(row + 2, numbers) for row, numbers in enumerate(added_raw(rows)) if numbers] == [(14, (11,))]
    rows[10] = rows[10]._replace(parents=(5, 11))  # block 11 has a child
    assert not any(added_raw(rows))
    later = [block._replace(parents=tuple(x + (x > 11) for x in block.parents)) for block in SPINENET[10:]]  # pyrefly: ignore[bad-argument-type]
    rows = [*SPINENET[:10], Block(5, "bottleneck", (8, 10)), *later]
    assert added_raw(rows)[13] == (11, 12)  # two of them
    tiny(specification=rows).eval()(torch.rand(1, 3, 128, 128))
    rows[9] = rows[9]._replace(kind="residual")  # of another width: no block can take it
    with pytest.raises(ValueError, match=r"row 9 \(block 11\): nothing uses it"):
        checked(rows)


@pytest.fixture(scope="module")
def shapes_alone():
    with torch.device("meta"):
        return SpineNet.of_size("49s")


@pytest.mark.parametrize(("height", "width"), [(640, 640), (384, 256), (300, 500), (320, 320), (1, 1)])
def test_strides(shapes_alone, height, width):
    levels = shapes_alone(torch.empty(2, 3, height, width, device="meta"))
    for level, stride in zip(levels.values(), (8, 16, 32, 64, 128), strict=True):
        padded = (-(-height // 128) * 128, -(-width // 128) * 128)
        assert level.shape == (2, 256, padded[0] // stride, padded[1] // stride)


@pytest.mark.parametrize("kwargs", [{}, {"size_divisible": 32}, {"min_size": 200, "max_size": 320}])
def test_anchors_keep_exact_strides_where_an_image_is_padded(kwargs):
    kwargs = {"min_size": None} | kwargs
    model = retina_fast.RetinaNet(tiny(), num_classes=2, **kwargs).eval()
    seen = []
    model.backbone.register_forward_hook(lambda module, x, y: seen.append((x[0].shape, y)))
    pictures = [torch.rand(3, 300, 200), torch.rand(3, 100, 257)]
    every = forward.run(model, model.make_batch(pictures, None)).anchors
    ((shape, levels),) = seen
    assert all(side % 128 == 0 for side in shape[2:])
    first = 0
    for level, stride in zip(levels.values(), (8, 16, 32, 64, 128), strict=True):
        anchors = every[first : first + 9 * level.shape[2] * level.shape[3]]
        first += len(anchors)
        centres = (anchors[:, :2] + anchors[:, 2:]).view(*level.shape[2:], 9, 2) / 2
        assert torch.equal(centres[1:] - centres[:-1], torch.tensor([0.0, stride]).expand_as(centres[1:]))
        assert torch.equal(centres[:, 1:] - centres[:, :-1], torch.tensor([stride, 0.0]).expand_as(centres[:, 1:]))
    assert first == len(every)


def test_what_is_padded_is_black_at_the_right_and_at_the_bottom():
    net, image = tiny().eval(), torch.rand(1, 3, 100, 130)
    whole = torch.zeros(1, 3, 128, 256)
    whole[:, :, :100, :130] = image
    assert all(torch.equal(a, b) for a, b in zip(net(image).values(), net(whole).values(), strict=True))


def test_initialisation_is_a_cut_normal_of_variance_one_over_fan_in():
    net: Any = SpineNet()
    for conv in (net.blocks[5][0].branch[1][0], net.links[3][1][0][0]):
        fan_in = conv.weight[0].numel()
        assert conv.weight.var().item() * fan_in == pytest.approx(1, rel=0.05)
        assert conv.weight.abs().max() <= 2 / 0.8796 / fan_in**0.5 * 1.001
    norms = [module for module in tiny().modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-3)}
    assert all((norm.weight == 1).all() for norm in norms)


def test_stochastic_depth_grows_row_by_row_and_spares_the_stem():
    net: Any = tiny(stochastic_depth=0.3, repeats=2, activation="silu")
    rates = [[block.branch[-1].p for block in group] for group in net.blocks]
    assert rates[:2] == [[0, 0], [0, 0]]
    for row, (one, other) in enumerate(rates[2:]):
        assert one == other == pytest.approx(0.3 * (row + 1) / 15)
    images = torch.rand(2, 3, 128, 128)
    assert not torch.equal(net(images)["p3"], net(images)["p3"])
    assert torch.equal(net.eval()(images)["p3"], net(images)["p3"])
    activations = {type(module) for module in net.modules() if isinstance(module, nn.ReLU | nn.SiLU)}
    assert activations == {nn.SiLU}


def test_bad_arguments():
    with pytest.raises(ValueError, match="activation must be one of relu, silu, got 'gelu'"):
        tiny(activation="gelu")
    with pytest.raises(ValueError, match="size must be one of 49s, 49, 96, 143, 190, got '50'"):
        SpineNet.of_size("50")


# Specifications at random: any levels and kinds, outputs in any order and among the others.


def valid(rng: random.Random) -> tuple[Block, ...]:
    while True:
        middle = rng.randint(0, 10)
        roles: list[int | None] = [None] * middle + [3, 4, 5, 6, 7]
        rng.shuffle(roles)
        rows, unused = [], {1}
        for number, output in enumerate(roles, start=2):
            first = rng.choice(sorted(unused) if unused and rng.random() < 0.8 else range(number))
            second = rng.choice([x for x in range(number) if x != first])
            unused -= {first, second}
            if output is None:
                unused.add(number)
            level = output or rng.randint(2, 7)
            rows.append(Block(level, rng.choice(("bottleneck", "residual")), (first, second), output is not None))
        with contextlib.suppress(ValueError):  # a block that nothing uses is left, now and then
            return checked(rows)


def no_norm(channels: int) -> nn.Module:
    """Half the time of building such small networks is their norms."""
    return nn.Identity()


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_specifications_run(count, monkeypatch):
    monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda conv: None)  # the network draws its own weights
    rng = random.Random(0)
    image = torch.rand(1, 3, 128, 128)
    seen = set()
    raw = 0
    for _ in range(count):
        rows = valid(rng)
        seen.add(rows)
        raw += any(added_raw(rows))
        with torch.no_grad():
            levels = SpineNet(rows, width=0.02, out_channels=2, norm_layer=no_norm)(image)
        assert [level.shape for level in levels.values()] == [(1, 2, n, n) for n in (16, 8, 4, 2, 1)]
    assert len(seen) > 0.98 * count
    assert raw > 0.03 * count


def spoil(rng: random.Random) -> tuple[list, str]:
    """The rows of a valid specification with one mistake, and what the message must hold: the row, and more."""
    rows: list = list(valid(rng))
    row = rng.randrange(len(rows))
    block, name = rows[row], f"row {row} (block {row + 2}): "
    outputs = [i for i, other in enumerate(rows) if other.is_output]
    match rng.randrange(10):
        case 0:
            late = rng.randint(row + 2, 30)
            rows[row] = block._replace(parents=(rng.randrange(row + 2), late))
            return rows, f"{name}parent {late} does not come earlier"
        case 1:
            rows[row] = block._replace(parents=(-rng.randint(1, 9), 0))
            return rows, f"{name}parent -"
        case 2:
            level = rng.choice([-1, 0, 1, 8, 9, 3.0, "3", None])
            rows[row] = block._replace(level=level)
            return rows, f"{name}level must be one of 2 to 7, got {level!r}"
        case 3:
            rows[row] = block._replace(kind=rng.choice(["mbconv", "Bottleneck", None, 3]))
            return rows, f"{name}kind must be"
        case 4:
            rows[row] = block._replace(parents=(block.parents[0],) * 2)
            return rows, f"{name}its parents must be two"
        case 5:
            rows[row] = rng.choice([block[:2], (*block, 1), 7, (*block[:2], 5), (*block[:2], (1, 2, 3))])
            return rows, f"{name}must be (level, kind, (parent, parent), is_output)"
        case 6:
            rows[row] = block._replace(is_output=rng.choice([1, "yes", None]))
            return rows, f"{name}is_output must be True or False"
        case 7:
            level = rng.choice([3, 4, 5, 6, 7])
            rows.append(Block(level, "residual", (0, 1), True))
            return rows, f"row {len(rows) - 1} (block {len(rows) + 1}): row "
        case 8:
            rows.append(Block(rng.randint(2, 7), "residual", (0, 1)))
            return rows, f"row {len(rows) - 1} (block {len(rows) + 1}): nothing uses it"
        case _:
            row = rng.choice(outputs)
            rows[row] = rows[row]._replace(is_output=False)
            return rows, f"up to row {len(rows) - 1}, the last, no row is an output of level {rows[row].level}"


def test_a_hundred_invalid_specifications_are_refused_by_row():
    rng = random.Random(1)
    messages = set()
    for _ in range(100):
        rows, expected = spoil(rng)
        with pytest.raises(ValueError, match="row") as refusal:
            SpineNet(rows)
        assert expected in str(refusal.value)
        messages.add(str(refusal.value))
    assert len(messages) > 60


LINEAR = [(3, "residual", (0, 1), True), *((level, "residual", (level - 3, level - 2), True) for level in range(4, 8))]


def test_the_smallest_specification_and_what_it_must_have():
    assert [block.level for block in checked(LINEAR)] == [3, 4, 5, 6, 7]
    assert SpineNet([list(row) for row in LINEAR], width=0.05).specification == checked(LINEAR)
    with pytest.raises(ValueError, match=r"no row 0: it is empty"):
        checked([])
    with pytest.raises(ValueError, match=r"row 0 \(block 2\): an output must be of level 3 to 7, got 2"):
        checked([(2, "bottleneck", (0, 1), True)])
    without_stem = [(2, "residual", (0, 1)), *LINEAR]
    with pytest.raises(ValueError, match=r"row 0 \(block 2\): nothing uses it"):
        checked([without_stem[0], *((level, kind, (0, 1), out) for level, kind, _, out in LINEAR)])


@pytest.mark.parametrize("rows", [MOBILE_SPINENET, LINEAR])
def test_the_picture_of_a_specification(rows, tmp_path):
    pytest.importorskip("matplotlib")
    content = {"arguments": {"specification": rows}} if rows is LINEAR else rows  # as search writes it, or the rows
    (tmp_path / "rows.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["permutation", str(tmp_path / "rows.json"), "--output", str(tmp_path / "rows.svg")])
        permutation.main()
    picture = (tmp_path / "rows.svg").read_text()
    links = picture.count('<g id="patch_') - 3 - (2 + len(rows))  # without grounds, axis and blocks
    assert links == 1 + 2 * len(rows) + sum(
        map(len, added_raw([Block(*row) for row in rows]))
    )  # the first is from block 0 to 1


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "spinenet.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    with torch.device("meta"):
        exec(example, names)
    assert len(names["model"].backbone.specification) == len(names["rows"]) == 6
