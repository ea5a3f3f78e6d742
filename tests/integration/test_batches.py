"""The in-memory data path: what a batch holds, and that it depends on (seed, epoch, step) alone."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from normlab.lab.batches import Batches, crop, evaluation_batches, flip
from normlab.lab.tasks import Split


def images(number=37, channels=2, height=8, width=8):
    """Return a split whose targets are the sample numbers, so that a batch tells what it holds."""
    generator = torch.Generator().manual_seed(0)
    shape = (number, channels, height, width)
    pixels = torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.arange(number))


def batches(split=None, **options):
    split = split or images()
    channels = split.inputs.shape[1]
    defaults = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "batch_size": 8, "seed": 0}
    return Batches(split, **{**defaults, **options})


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@settings(max_examples=30, deadline=None)
@given(
    number=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_an_epoch_holds_samples_once_and_drops_the_last_partial_batch(
    number, batch_size, seed, epoch
):
    data = batches(images(number, 1, 2, 2), batch_size=batch_size, seed=seed)
    assert data.steps_per_epoch == max(1, number // batch_size)
    seen = torch.cat([data.batch(epoch, step)[1] for step in range(data.steps_per_epoch)])
    assert len(seen.unique()) == len(seen)
    assert len(seen) == data.steps_per_epoch * min(batch_size, number)


def test_inputs_are_normalised_by_channel():
    split = images()
    data = batches(split, mean=(10.0, 100.0), std=(2.0, 50.0))
    inputs, targets = data.batch(0, 1)
    stored = split.inputs[targets].double()
    expected = torch.stack([(stored[:, 0] - 10) / 2, (stored[:, 1] - 100) / 50], dim=1)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.double(), expected, rtol=1e-6, atol=1e-6)


def test_features_are_normalised_too():
    split = Split(torch.randn(10, 3), torch.arange(10))
    inputs, targets = batches(split, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0)).batch(0, 0)
    expected = (split.inputs[targets] - torch.tensor([1.0, 2, 3])) / torch.tensor([1.0, 2, 4])
    torch.testing.assert_close(inputs, expected)


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop-flip"])
def test_a_batch_depends_on_seed_epoch_and_step_alone(augmentation):
    one = batches(augmentation=augmentation)
    first = one.batch(epoch=3, step=2)
    torch.manual_seed(1)
    one.batch(epoch=0, step=0)
    one.batch(epoch=4, step=1)
    assert_same(one.batch(epoch=3, step=2), first)
    continued = batches(augmentation=augmentation)
    continued.batch(epoch=2, step=0)
    assert_same(continued.batch(epoch=3, step=2), first)


def test_drawing_a_batch_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    batches(augmentation="crop-flip").batch(0, 0)
    assert torch.equal(torch.rand(1), expected)


def test_seed_and_epoch_change_the_order():
    def order(seed, epoch):
        data = batches(seed=seed)
        return torch.cat([data.batch(epoch, step)[1] for step in range(data.steps_per_epoch)])

    assert not torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))
    # A seed in one epoch must not be the next seed in the epoch before.
    assert not torch.equal(order(0, 1), order(1, 0))
    assert not torch.equal(order(0, 0), torch.arange(32))


def test_augmentation_does_not_change_the_order():
    plain, augmented = batches(), batches(augmentation="crop-flip")
    assert torch.equal(plain.batch(2, 1)[1], augmented.batch(2, 1)[1])


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop-flip"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_see_the_shards_of_one_process(augmentation, world_size):
    whole = batches(augmentation=augmentation)
    parts = [
        batches(augmentation=augmentation, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch, step in ((0, 0), (1, 3)):
        shards = [part.batch(epoch, step) for part in parts]
        assert all(len(targets) == 8 // world_size for _, targets in shards)
        joined = tuple(torch.cat(tensors) for tensors in zip(*shards, strict=True))
        assert_same(joined, whole.batch(epoch, step))


def test_crop_and_flip_match_a_loop_over_samples():
    stored = images(number=20, channels=3, height=8, width=6).inputs
    generator = torch.Generator().manual_seed(1)
    tops = torch.randint(5, (20,), generator=generator)
    lefts = torch.randint(3, (20,), generator=generator)
    chosen = torch.rand(20, generator=generator) < 0.5
    cropped = crop(stored, tops, lefts, (2, 1))
    flipped = flip(cropped, chosen)
    assert flipped.dtype == torch.uint8
    for n in range(20):
        for row in range(8):
            for column in range(6):
                source = column if not chosen[n] else 5 - column
                y, x = row + int(tops[n]) - 2, source + int(lefts[n]) - 1
                inside = 0 <= y < 8 and 0 <= x < 6
                expected = stored[n, :, y, x] if inside else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(flipped[n, :, row, column], expected)


def shift_and_flip_of(augmented, original, pad):
    """Return (top, left, flipped) that make the one of the other; stored pixels are never 0."""
    size = original.shape[-1]
    framed = torch.zeros(original.shape[0], size + 2 * pad, size + 2 * pad)
    framed[:, pad : pad + size, pad : pad + size] = original
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            cut = framed[:, top : top + size, left : left + size]
            if torch.equal(cut, augmented):
                return top, left, False
            if torch.equal(cut.flip(2), augmented):
                return top, left, True
    raise AssertionError("neither a shift nor a flip of the original")


@pytest.mark.parametrize(("size", "pad"), [(32, 4), (28, 4), (16, 2), (8, 1), (4, 1)])
def test_crop_flip_draws_every_shift_and_both_sides(size, pad):
    split = images(number=32, channels=1, height=size, width=size)
    data = batches(split, batch_size=32, augmentation="crop-flip")
    drawn = []
    for epoch in range(8):
        inputs, targets = data.batch(epoch, 0)
        for picture, target in zip(inputs, targets, strict=True):
            drawn.append(shift_and_flip_of(picture, split.inputs[target].float(), pad))
    for axis in (0, 1):
        assert {shift[axis] for shift in drawn} == set(range(2 * pad + 1))
    share = sum(flipped for *_, flipped in drawn) / len(drawn)
    assert 0.37 < share < 0.63  # four standard deviations of 256 fair coins


def test_flip_alone_never_shifts():
    split = images(number=32)
    inputs, targets = batches(split, batch_size=32, augmentation="flip").batch(0, 0)
    drawn = [
        shift_and_flip_of(picture, split.inputs[target].float(), 1)
        for picture, target in zip(inputs, targets, strict=True)
    ]
    assert {(top, left) for top, left, _ in drawn} == {(1, 1)}
    assert {flipped for *_, flipped in drawn} == {True, False}


def test_steps_of_an_epoch_are_augmented_differently():
    pixels = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(64, 1, 1, 1)
    split = Split(pixels, torch.arange(64))
    data = batches(split, batch_size=32, augmentation="crop-flip")
    assert not torch.equal(data.batch(0, 0)[0], data.batch(0, 1)[0])
    assert not torch.equal(data.batch(0, 0)[0], data.batch(1, 0)[0])


def test_a_set_smaller_than_the_batch_makes_one_batch_of_all():
    data = batches(images(number=5), batch_size=8)
    assert data.steps_per_epoch == 1
    assert sorted(data.batch(0, 0)[1].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 7, 8, 17])
def test_evaluation_sees_every_sample_once_in_order(world_size, number):
    split = images(number)
    seen = []
    for rank in range(world_size):
        options = {"mean": (5.0, 5.0), "std": (2.0, 2.0), "batch_size": 8}
        for inputs, targets in evaluation_batches(
            split, **options, rank=rank, world_size=world_size
        ):
            assert 0 < len(targets) <= 8
            torch.testing.assert_close(inputs, (split.inputs[targets].float() - 5) / 2)
            seen += targets.tolist()
    assert sorted(seen) == list(range(number))
    assert world_size > 1 or seen == list(range(number))


def test_evaluation_shards_are_parts_of_the_same_batches():
    split = images(16)
    options = {"mean": (0.0, 0.0), "std": (1.0, 1.0), "batch_size": 8, "world_size": 2}
    first, second = (
        [targets.tolist() for _, targets in evaluation_batches(split, **options, rank=rank)]
        for rank in (0, 1)
    )
    assert first == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert second == [[4, 5, 6, 7], [12, 13, 14, 15]]


def test_stored_samples_are_never_changed():
    split = Split(torch.randn(12, 3), torch.arange(12))
    before = split.inputs.clone()
    options = {"mean": (1.0,) * 3, "std": (2.0,) * 3, "batch_size": 12}
    Batches(split, **options, seed=0).batch(0, 0)[0].zero_()
    for inputs, _ in evaluation_batches(split, **options):
        inputs.zero_()
    assert torch.equal(split.inputs, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "crop"}, "expected one of none, flip, crop-flip, got 'crop'"),
        ({"batch_size": 0}, "expected at least 1"),
        ({"batch_size": 7, "world_size": 2}, "divides by the 2 processes"),
        ({"batch_size": 64, "world_size": 2}, "got 37 of 37 samples"),
        ({"rank": 2, "world_size": 2}, "expected a rank from 0 to 1"),
    ],
)
def test_what_cannot_be_batched_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)


def test_features_cannot_be_flipped():
    with pytest.raises(ValueError, match="use augmentation 'none'"):
        batches(Split(torch.randn(10, 3), torch.arange(10)), augmentation="flip")


@pytest.mark.parametrize("step", [-1, 4])
def test_a_step_outside_the_epoch_is_refused(step):
    with pytest.raises(ValueError, match=r"batch\(step=.*expected 0 to 3"):
        batches().batch(0, step)
