"""The workbench's data sets: what they hold, how they are divided, and what damage is refused."""

import gzip
import io
import re
import struct
import subprocess
import sys
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from data_root import require_data
from normlab.lab.tasks import (
    TASKS,
    Split,
    Task,
    channel_statistics,
    cifar10,
    hold_out,
    hub,
    idx,
    limit,
    load_task,
)
from normlab.lab.tasks.task import split_off, stratified_indices


def small_task(train=40, test=20, classes=4):
    """Return a task whose pixels are the sample numbers."""
    numbers = torch.arange(train + test, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    inputs = numbers.expand(-1, 1, 2, 2).contiguous()
    targets = torch.arange(train + test) % classes
    return Task(
        name="small",
        title="Small",
        train=Split(inputs[:train], targets[:train]),
        test=Split(inputs[train:], targets[train:]),
        class_names=tuple("abcdefgh"[:classes]),
        mean=(0.0,),
        std=(1.0,),
    )


def numbers_of(split):
    return split.inputs[:, 0, 0, 0].tolist()


# What a task is.


def test_names_are_listed_without_the_libraries_that_read():
    code = (
        "import sys; from normlab.lab.tasks import TASKS; print(*[t.name for t in TASKS]);"
        "assert not {'sklearn', 'datasets', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ["digits", "mnist", "fashion-mnist", "cifar10", "image-folder", "npz"]
    assert done.stdout.split() == names == [entry.name for entry in TASKS]


def test_shapes_and_classes_follow_from_the_data():
    task = small_task()
    assert task.input_shape == (1, 2, 2)
    assert task.num_classes == 4


def test_loss_is_the_mean_cross_entropy_and_takes_mixed_labels():
    outputs, targets = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    logits = outputs.numpy()
    log_total = np.log(np.exp(logits).sum(axis=1))
    expected = float((log_total - logits[np.arange(5), targets.numpy()]).mean())
    assert float(Task.loss(outputs, targets)) == pytest.approx(expected)
    mixed = 0.3 * torch.eye(3, dtype=torch.float64)[targets] + 0.7 / 3
    expected = float((log_total - (mixed.numpy() * logits).sum(axis=1)).mean())
    assert float(Task.loss(outputs, mixed)) == pytest.approx(expected)


def test_count_correct():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert int(Task.count_correct(outputs, torch.tensor([1, 1, 1]))) == 2
    mixed = torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.4, 0.6]])
    assert int(Task.count_correct(outputs, mixed)) == 2


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2).long(), "float32"),
        (torch.zeros(2), torch.zeros(2).long(), "float32"),
        (torch.zeros(2, 3), torch.zeros(2), "int64 classes"),
        (torch.zeros(2, 3), torch.zeros(3).long(), "got 2 inputs and 3 targets"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "at least one sample"),
    ],
)
def test_a_split_that_is_not_one_is_refused(inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        Split(inputs, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ("a", "b", "c")}, "expected training targets from 0 to 2, got 0 to 3"),
        ({"mean": (0.0, 0.0)}, "expected 1 means"),
        ({"std": (0.0,)}, "positive standard deviations"),
        ({"augmentation": "crop"}, "expected augmentation to be one of none, flip, crop-flip"),
        ({"test": Split(torch.zeros(2, 2), torch.zeros(2).long())}, "one shape and dtype"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(small_task(), **change)


@pytest.mark.parametrize("shape", [(50, 3, 4, 5), (50, 7)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_channel_statistics_match_float64(shape, dtype):
    values = torch.randint(0, 256, shape).to(dtype)
    values[:, 0] = 9
    mean, std = channel_statistics(values)
    axes = (0, *range(2, len(shape)))
    np.testing.assert_allclose(mean, values.numpy().astype(np.float64).mean(axes), rtol=1e-12)
    expected = values.numpy().astype(np.float64).std(axes)
    expected[0] = 1  # a constant channel normalises to zero instead of NaN
    np.testing.assert_allclose(std, expected, rtol=1e-12)


# How samples are divided.


@settings(max_examples=60, deadline=None)
@given(data=st.data(), targets=st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_stratified_indices_keep_the_share_of_each_class(data, targets):
    classes = torch.tensor(targets)
    size = data.draw(st.integers(0, len(targets)))
    indices = stratified_indices(classes, size, seed=data.draw(st.integers(0, 99)))
    assert len(indices) == size
    assert indices.tolist() == sorted(set(indices.tolist()))
    for k in set(targets):
        exact = size * targets.count(k) / len(targets)
        assert abs(int((classes[indices] == k).sum()) - exact) < 1


def test_hold_out_divides_the_training_set_and_never_sees_the_test_set():
    task = small_task()
    tuning = hold_out(task, fraction=0.2, seed=0)
    assert sorted(numbers_of(tuning.train) + numbers_of(tuning.test)) == list(range(40))
    assert tuning.test.targets.bincount().tolist() == [2, 2, 2, 2]
    assert "held out" in tuning.note
    again = hold_out(task, fraction=0.2, seed=0)
    assert numbers_of(again.test) == numbers_of(tuning.test)
    assert numbers_of(hold_out(task, fraction=0.2, seed=1).test) != numbers_of(tuning.test)
    for number, target in zip(numbers_of(tuning.test), tuning.test.targets, strict=True):
        assert number % 4 == int(target)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.001, 0.999])
def test_hold_out_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="leaves samples on both sides of 40"):
        hold_out(small_task(), fraction, seed=0)


def test_limit_keeps_a_stratified_part_and_always_the_same():
    task = small_task()
    part = limit(task, train_size=8, test_size=4)
    assert part.train.targets.bincount().tolist() == [2, 2, 2, 2]
    assert part.test.targets.bincount().tolist() == [1, 1, 1, 1]
    assert set(numbers_of(part.test)) <= set(range(40, 60))
    assert numbers_of(limit(task, train_size=8).train) == numbers_of(part.train)
    assert limit(task, train_size=8).test is task.test
    assert part.note == "8 train samples kept, 4 test samples kept"
    assert limit(task, train_size=40) is task


@pytest.mark.parametrize("size", [0, -1, 41])
def test_limit_outside_the_set_is_refused(size):
    with pytest.raises(ValueError, match=rf"limit\(train_size={size}\): expected 1 to 40"):
        limit(small_task(), train_size=size)


# Loading by name.


def test_digits_are_divided_for_good():
    task = load_task("digits")
    assert (task.title, task.input_shape, task.num_classes) == ("Digits (8x8)", (1, 8, 8), 10)
    assert (len(task.train), len(task.test)) == (1347, 450)
    assert task.augmentation == "none"
    assert int(task.train.inputs.max()) == 16

    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    together = torch.cat([task.train.inputs, task.test.inputs]).reshape(1797, 64)
    labels = torch.cat([task.train.targets, task.test.targets])
    both = (together.tolist(), labels.tolist())
    ours = sorted((*row, label) for row, label in zip(*both, strict=True))
    pairs = zip(pixels, classes, strict=True)
    theirs = sorted((*map(int, row), int(label)) for row, label in pairs)
    assert ours == theirs
    shares = task.test.targets.bincount().numpy() / np.bincount(classes)
    assert float(shares.max() - shares.min()) < 0.006
    assert torch.equal(load_task("digits").test.inputs, task.test.inputs)
    normalised = (task.train.inputs.double() - task.mean[0]) / task.std[0]
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-9)
    assert float(normalised.square().mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("digit", None, {}, "expected one of digits, mnist, .*did you mean 'digits'"),
        ("fashion_mnist", None, {}, "did you mean 'fashion-mnist'"),
        ("digits", "somewhere", {}, "expected no data, which are bundled"),
        ("digits", None, {"image_size": 8}, "expected no options, got 'image_size'"),
        ("image-folder", "x", {"imagesize": 8}, "did you mean 'image_size'"),
        ("image-folder", "x", {"image_size": "8"}, "expected a whole number, got '8'"),
        ("image-folder", "x", {"image_size": 0}, "expected at least 1, got 0"),
        ("image-folder", None, {}, "expected train/<class>"),
        ("mnist", None, {}, r"'data/mnist'.*train-images-idx3-ubyte.gz.*\n    curl .*https://"),
        ("fashion-mnist", None, {}, r"'data/fashion-mnist'.*\n    curl .*zalandoresearch"),
        ("cifar10", None, {}, r"expected one train-\*.parquet .*got 0.*\n    hf download"),
        ("npz", None, {}, "expected a file, got none.*numpy.savez"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch, name, data, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        load_task(name, data, **options)


def test_a_library_that_does_not_work_is_named_with_its_extra(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name in ("datasets", "PIL", "sklearn"):
                raise RuntimeError("operator does not exist")

    for name in list(sys.modules):
        if name.split(".")[0] in ("datasets", "PIL", "sklearn"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"RuntimeError: operator .*normlab\[hub\]"):
        hub.read_image_table("x.parquet")
    with pytest.raises(ValueError, match=r"RuntimeError: operator .*normlab\[hub\]"):
        hub.read_image_files(["x.png"], 8)
    with pytest.raises(ValueError, match=r"RuntimeError: operator .*normlab\[lab\]"):
        load_task("digits")


# idx files.


def idx_bytes(array):
    header = struct.pack(f">I{array.ndim}I", 2048 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_packed_or_not(tmp_path, suffix):
    array = np.arange(24).reshape(2, 3, 4)
    content = idx_bytes(array)
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(content, mtime=0) if suffix else content)
    assert idx.read_idx(path, 3).tolist() == array.tolist()
    assert idx.read_idx(path, 3).dtype == torch.uint8


WHOLE = idx_bytes(np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:-9], "got EOFError"),
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:5], "got EOFError"),
        ("a.gz", b"<html>not found</html>", "got BadGzipFile"),
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:12] + b"\xff" * 30, "expected a whole file"),
        ("a", WHOLE[:-1], "expected 24 bytes for 2x3x4, got 23"),
        ("a", WHOLE + b"\0", "expected 24 bytes for 2x3x4, got 25"),
        ("a", idx_bytes(np.zeros(3)), "begins with the number 2051, got 2049"),
        ("a", WHOLE[:9], "begins with the number 2051, got 2051 in 9 bytes"),
        ("a", b"", "got 0 in 0 bytes"),
        ("a", b"\0\0\x0d\x03" + WHOLE[4:], "begins with the number 2051"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        idx.read_idx(path, 3)


@pytest.fixture
def idx_folder(tmp_path, monkeypatch):
    """Return a folder like MNIST's with 20 training and 10 test images."""
    monkeypatch.setattr(idx, "IMAGES", {"train": 20, "test": 10})
    generator = np.random.default_rng(0)
    for which, number in idx.IMAGES.items():
        images, labels = idx.FILES[which]
        pixels = generator.integers(0, 256, (number, 28, 28))
        (tmp_path / images).write_bytes(idx_bytes(pixels))
        (tmp_path / f"{labels}.gz").write_bytes(gzip.compress(idx_bytes(np.arange(number) % 10)))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "title"), [("mnist", "MNIST"), ("fashion-mnist", "Fashion-MNIST")]
)
def test_idx_folders_make_tasks(idx_folder, name, title):
    task = load_task(name, str(idx_folder))
    assert (task.title, task.input_shape, task.num_classes) == (title, (1, 28, 28), 10)
    assert (len(task.train), len(task.test)) == (20, 10)
    assert task.train.targets.tolist() == list(range(10)) * 2
    assert task.train.inputs.dtype == torch.uint8


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (idx.FILES["train"][0], np.zeros((19, 28, 28)), "expected 20x28x28 pixels, got 19x28x28"),
        (idx.FILES["test"][0], np.zeros((10, 32, 32)), "expected 10x28x28 pixels, got 10x32x32"),
        (idx.FILES["train"][1], np.zeros(19), "expected 20 labels, one for each image, got 19"),
        (idx.FILES["test"][1], np.arange(1, 11), "expected labels from 0 to 9, got 10"),
    ],
)
def test_idx_files_of_other_data_are_refused_by_name(idx_folder, file, array, message):
    # An unpacked file is read before a packed one.
    (idx_folder / file).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        load_task("mnist", idx_folder)


# Parquet files.


def encoded(pixels, encoding="PNG"):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, encoding)
    return buffer.getvalue()


def write_parquet(path, blobs, labels, image_column="img", label_column="label"):
    import pyarrow as pa
    from pyarrow import parquet

    cells = [{"bytes": blob, "path": f"{n}.png"} for n, blob in enumerate(blobs)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image_column: pa.array(cells, type=kind), label_column: pa.array(labels)}
    parquet.write_table(pa.table(columns), path)


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("column", ["img", "image"])
def test_image_tables_are_read_exactly(tmp_path, column):
    path = tmp_path / "odd [name] *.parquet"
    write_parquet(path, [encoded(p) for p in PIXELS], [3, 1, 4, 1, 5, 9], image_column=column)
    table = hub.read_image_table(path)
    assert torch.equal(table.images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert table.labels.tolist() == [3, 1, 4, 1, 5, 9]
    assert table.encodings == {"PNG"}


@pytest.mark.parametrize(("encoding", "title"), [("PNG", "CIFAR-10"), ("JPEG", "CIFAR-10 (JPEG)")])
def test_cifar10_is_titled_by_how_its_images_are_stored(tmp_path, monkeypatch, encoding, title):
    monkeypatch.setattr(cifar10, "IMAGES", {"train": 4, "test": 2})
    folder = tmp_path / "plain_text"
    folder.mkdir()
    blobs = [encoded(p, encoding) for p in PIXELS]
    write_parquet(folder / "train-00000-of-00001.parquet", blobs[:4], [0, 1, 2, 9])
    write_parquet(folder / "test-00000-of-00001.parquet", blobs[4:], [3, 4])
    task = load_task("cifar10", tmp_path)
    assert (task.title, task.input_shape, task.num_classes) == (title, (3, 32, 32), 10)
    assert task.augmentation == "crop-flip"
    assert bool(task.note) == (encoding == "JPEG")
    assert task.test.targets.tolist() == [3, 4]


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("blobs", "options", "damage", "message"),
    [
        ([encoded(PIXELS[0])], {}, cut, "expected a parquet file"),
        ([encoded(PIXELS[0])], {}, lambda content: b"", "expected a parquet file"),
        ([cut(encoded(PIXELS[0]))], {}, None, "expected an image in row 0, got OSError"),
        ([encoded(PIXELS[0]), b"no image"], {}, None, "expected an image in row 1"),
        ([encoded(PIXELS[0]), encoded(PIXELS[1][:9])], {}, None, "of 32x32, got 32x9 in row 1"),
        ([encoded(PIXELS[0])], {"image_column": "x"}, None, "columns 'img' or 'image' and 'label'"),
        ([encoded(PIXELS[0])], {"label_column": "y"}, None, "got 'img', 'y'"),
        ([encoded(PIXELS[0])], {"labels": [None]}, None, "expected whole numbers in 'label'"),
        ([], {}, None, "expected images, got an empty table|expected a parquet file"),
    ],
)
def test_damaged_tables_are_refused_by_name(tmp_path, capfd, blobs, options, damage, message):
    path = tmp_path / "train-0.parquet"
    options = {"labels": list(range(len(blobs))), **options}
    write_parquet(path, blobs, **options)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*(?:{message})"):
        hub.read_image_table(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (PIXELS[:3], [0, 1, 2], "expected 4 images of 3x32x32, got 3 of 3x32x32"),
        (PIXELS[:4, :16], [0, 1, 2, 3], "got 4 of 3x16x32"),
        (PIXELS[:4], [0, 1, 2, 10], "expected labels from 0 to 9, got 0 to 10"),
        (PIXELS[:4], [0, 1, 2, -1], "expected labels from 0 to 9, got -1 to 2"),
    ],
)
def test_tables_that_are_not_cifar10_are_refused_by_name(
    tmp_path, monkeypatch, pixels, labels, message
):
    monkeypatch.setattr(cifar10, "IMAGES", {"train": 4, "test": 2})
    path = tmp_path / "train-00000-of-00001.parquet"
    write_parquet(path, [encoded(p) for p in pixels], labels)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        load_task("cifar10", tmp_path)


# A user's own images.


def write_images(folder, names, number=5, mode="RGB", size=(10, 8)):
    from PIL import Image

    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for n in range(number):
            colour = (40 * shade, n, 200) if mode == "RGB" else 40 * shade
            Image.new(mode, size, colour).save(folder / name / f"{n}.png")


def test_image_folder_with_a_test_folder(tmp_path):
    write_images(tmp_path / "train", ["cat", "ant", "bee"])
    write_images(tmp_path / "val", ["bee"], number=2)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    task = load_task("image-folder", tmp_path, image_size=6)
    assert task.class_names == ("ant", "bee", "cat")
    assert task.input_shape == (3, 6, 6)
    assert task.train.targets.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert task.test.targets.tolist() == [1, 1]
    # cat was written first, so its red is 0; the file's number is its green.
    assert task.train.inputs[:, :, 3, 3].tolist()[10:] == [[0, n, 200] for n in range(5)]
    assert task.title == f"{tmp_path.name} (6x6)"
    assert task.note == ""


def test_image_folder_without_a_test_folder_splits_a_fifth_off(tmp_path):
    write_images(tmp_path / "train", ["cat", "ant"], number=10, mode="L")
    task = load_task("image-folder", tmp_path)
    assert task.input_shape == (1, 32, 32)
    assert task.test.targets.tolist() == [0, 0, 1, 1]
    assert len(task.train) == 16
    assert task.note == "no test folder: 4 of 20 images split off as the test set"


def test_image_folder_with_grey_training_and_coloured_test_images(tmp_path):
    write_images(tmp_path / "train", ["cat", "ant"], mode="L")
    write_images(tmp_path / "test", ["cat", "ant"])
    task = load_task("image-folder", tmp_path, image_size=4)
    assert task.input_shape == (3, 4, 4)
    assert len(task.mean) == 3
    assert task.train.inputs[-1, :, 0, 0].tolist() == [0, 0, 0]
    assert task.train.inputs[0, :, 0, 0].tolist() == [40, 40, 40]


def test_images_are_cut_to_their_centre(tmp_path):
    from PIL import Image

    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (hub.read_image_files([tmp_path / "a.png"], 4) == 255).all()


def test_image_files_that_cannot_be_used_are_refused_by_name(tmp_path):
    from PIL import Image

    write_images(tmp_path / "train", ["cat", "ant"])
    path = tmp_path / "train" / "cat" / "2.png"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*expected an image"):
            load_task("image-folder", tmp_path)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*expected 8 bits a channel"):
        load_task("image-folder", tmp_path)


def test_image_folders_that_cannot_be_used_are_refused_by_name(tmp_path):
    write_images(tmp_path / "train", ["cat"])
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        load_task("image-folder", tmp_path)
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(ValueError, match=r"train.ant'\): expected images in it, got none"):
        load_task("image-folder", tmp_path)
    write_images(tmp_path / "train", ["bee"])
    (tmp_path / "train" / "ant").rmdir()
    write_images(tmp_path / "test", ["bees"])
    with pytest.raises(ValueError, match="expected the classes of train, bee, cat, got 'bees'"):
        load_task("image-folder", tmp_path)
    (tmp_path / "test" / "bees").rename(tmp_path / "bees")
    with pytest.raises(ValueError, match=r"test'\): expected a folder for each class, got none"):
        load_task("image-folder", tmp_path)


# A user's own arrays.

LABELS = np.arange(20) % 4


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("shape", "options", "expected", "channels_last"),
    [
        ((20, 7), {}, (7,), False),
        ((20, 5, 6), {}, (1, 5, 6), False),
        ((20, 5, 6, 3), {}, (3, 5, 6), True),
        ((20, 1, 5, 6), {}, (1, 5, 6), False),
        ((20, 4, 5, 6), {}, (4, 5, 6), False),
        ((20, 3, 5, 3), {"layout": "NHWC"}, (3, 3, 5), True),
        ((20, 3, 5, 3), {"layout": "NCHW"}, (3, 5, 3), False),
        ((20, 5, 6, 12), {"layout": "NHWC"}, (12, 5, 6), True),
    ],
)
@pytest.mark.parametrize("kind", ["uint8", "int64", "float64"])
def test_arrays_are_laid_out_by_rule(tmp_path, shape, options, expected, channels_last, kind):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(kind)
    path = write_npz(tmp_path / "mine.npz", x=values, y=LABELS)
    task = load_task("npz", path, **options)
    assert task.input_shape == expected
    kept_as_bytes = kind != "float64" and len(shape) > 2
    assert task.train.inputs.dtype == (torch.uint8 if kept_as_bytes else torch.float32)
    ours = torch.cat([task.train.inputs, task.test.inputs]).int().tolist()
    theirs = values.transpose(0, 3, 1, 2) if channels_last else values.reshape(20, *expected)
    assert sorted(ours) == sorted(theirs.astype(int).tolist())
    assert len(task.train) == 16
    assert sorted(task.test.targets.tolist()) == [0, 1, 2, 3]
    assert task.note == "no test arrays: 4 of 20 samples split off as the test set"


def test_divided_arrays_are_kept_as_they_are(tmp_path):
    x = np.random.default_rng(0).random((20, 6))
    path = write_npz(
        tmp_path / "mine.npz",
        x_train=x[:12],
        y_train=LABELS[:12, None],
        x_test=x[12:],
        y_test=LABELS[12:],
        class_names=np.array(["a", "b", "c", "d", "e"]),
    )
    task = load_task("npz", path)
    torch.testing.assert_close(task.train.inputs, torch.tensor(x[:12], dtype=torch.float32))
    assert task.test.targets.tolist() == LABELS[12:].tolist()
    assert task.class_names == ("a", "b", "c", "d", "e")
    assert (task.title, task.note) == ("mine", "")


GOOD = {"x": np.zeros((20, 3)), "y": LABELS}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD["x"]}, "expected the arrays x_train, y_train, x_test, y_test or x, y, got x"),
        ({"x_train": GOOD["x"], "y_train": LABELS}, "got x_train, y_train"),
        ({**GOOD, "x": np.zeros((20, 3, 4, 3))}, "x\\): expected 1, 3 or 4 channels in either"),
        ({**GOOD, "x": np.zeros((20, 5, 6, 7))}, "give the option layout, NHWC or NCHW"),
        ({**GOOD, "x": np.zeros(20)}, "expected numbers in 2, 3 or 4 dimensions"),
        ({**GOOD, "x": np.zeros((20, 2, 2, 2, 2))}, "expected numbers in 2, 3 or 4 dimensions"),
        ({**GOOD, "x": np.full((20, 3), np.nan)}, "expected finite values"),
        ({**GOOD, "x": np.full((20, 3), "a")}, "expected numbers in 2, 3 or 4 dimensions"),
        ({**GOOD, "y": LABELS - 1}, "y\\): expected whole numbers from 0"),
        ({**GOOD, "y": LABELS.astype(float)}, "y\\): expected whole numbers from 0"),
        ({**GOOD, "y": np.eye(4)[LABELS]}, "y\\): expected whole numbers from 0"),
        ({**GOOD, "y": LABELS[:19]}, "got 20 inputs and 19 targets"),
        ({**GOOD, "class_names": np.array(["a", "b"])}, "targets from 0 to 1, got 0 to 3"),
        ({**GOOD, "x": np.array([object()] * 20)}, "expected a whole .npz file of plain arrays"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path, arrays, message):
    path = write_npz(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_task("npz", path)


def test_damaged_npz_files_are_refused_by_name(tmp_path):
    path = write_npz(tmp_path / "mine.npz", **GOOD)
    whole = path.read_bytes()
    np.save(tmp_path / "bare.npy", np.zeros(3))
    bare = (tmp_path / "bare.npy").read_bytes()
    scratched = whole[:90] + b"\xff" * 50 + whole[140:]
    for content in (whole[: len(whole) // 2], b"", b"text", scratched, bare):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*expected a whole"):
            load_task("npz", path)


def test_unknown_layout_is_refused(tmp_path):
    path = write_npz(tmp_path / "mine.npz", **GOOD)
    with pytest.raises(ValueError, match="expected NHWC or NCHW, got 'NWHC'"):
        load_task("npz", path, layout="NWHC")


def test_split_off_keeps_order():
    split = small_task().train
    rest, part = split_off(split, 0.25, seed=3)
    assert numbers_of(rest) == sorted(numbers_of(rest))
    assert numbers_of(part) == sorted(numbers_of(part))


# The real data.


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "mean", "std", "counts"),
    [
        (
            "mnist",
            0.1307,
            0.3081,
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        ),
        ("fashion-mnist", 0.2860, 0.3530, [6000] * 10),
    ],
)
def test_mnist_and_its_kin(name, mean, std, counts):
    task = load_task(name, require_data(name))
    assert (len(task.train), len(task.test)) == (60_000, 10_000)
    assert task.mean[0] / 255 == pytest.approx(mean, abs=1e-4)
    assert task.std[0] / 255 == pytest.approx(std, abs=1e-4)
    assert task.train.targets.bincount().tolist() == counts


@pytest.mark.data
@pytest.mark.slow
def test_cifar10():
    task = load_task("cifar10", require_data("cifar10-jpeg"))
    assert task.title == "CIFAR-10 (JPEG)"
    assert (len(task.train), len(task.test)) == (50_000, 10_000)
    assert [m / 255 for m in task.mean] == pytest.approx([0.4912, 0.4821, 0.4465], abs=1e-4)
    assert [s / 255 for s in task.std] == pytest.approx([0.2452, 0.2428, 0.2606], abs=1e-4)
    assert task.train.targets.bincount().tolist() == [5_000] * 10
    assert task.test.targets.bincount().tolist() == [1_000] * 10


def test_data_may_lie_below_the_folder_under_the_tasks_name(tmp_path):
    for folder in ("cifar10", "cifar10-jpeg"):
        (tmp_path / folder).mkdir()
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / folder))):
            load_task("cifar10", tmp_path)
        (tmp_path / folder).rmdir()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_task("cifar10", tmp_path)
