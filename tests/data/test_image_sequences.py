"""Image sequences: what the one from scikit-learn shows, and the published ones on small files of their form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moelora.data.image_datasets import ORDERS, TEMPLATES, _read
from moelora.data.image_digits import DIGITS, KNOWN, SHOWN, digits_base, digits_words
from moelora.data.image_sequences import (
    ImageSequence,
    ImageSplit,
    ImageTask,
    few_shot,
    read_image_sequence,
    shortened,
)
from moelora.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def digits() -> ImageSequence:
    return read_image_sequence("digits")


def keys(split: ImageSplit) -> set[bytes]:
    return {np.asarray(image).tobytes() for image in split.images}


def test_the_digits_are_the_images_they_are_said_to_be(digits):
    tasks = {task.name: task for task in digits.tasks}
    assert [tuple(order) for order in digits.orders.values()] == [tuple(digits.orders[name]) for name in "abc"]
    assert len(tasks) == 7
    for name, shown in SHOWN.items():
        task = tasks[name]
        assert task.classes == tuple(f"{name} {DIGITS[digit]}" for digit in shown)
        assert task.prompts[0] == f"a picture of a {name} {DIGITS[shown[0]]}."
        assert np.bincount(task.train.labels).tolist() == [16] * 5
        assert np.bincount(task.test.labels).tolist() == [40] * 5
        assert task.test.images.shape == (200, 8, 8, 3)
        assert task.test.images.dtype == np.uint8
    # What each disguise does, against scikit-learn's own images by hand.
    from sklearn.datasets import load_digits

    loaded = load_digits()
    plain = np.round(loaded.images * 255 / 16).astype(np.uint8)
    grey = {label: {image.tobytes() for image in plain[loaded.target == label]} for label in range(10)}
    undo = {
        "red": lambda image: image[..., 0],
        "inverted": lambda image: 255 - image[..., 1],
        "mirrored": lambda image: image[:, ::-1, 2],
        "turned": lambda image: np.rot90(image[..., 0], -1),
    }
    for name, back in undo.items():
        for image, label in zip(tasks[name].test.images, tasks[name].test.labels, strict=True):
            assert np.ascontiguousarray(back(image)).tobytes() in grey[SHOWN[name][label]]
    assert not tasks["red"].test.images[..., 1:].any()


def test_parts_and_backbone_share_no_image(digits):
    base = digits_base()
    assert len(base.classes) == 10 + 5 * len(KNOWN)
    assert not set(base.classes) & {name for task in digits.tasks for name in task.classes}
    plain = keys(ImageSplit(base.train.images[base.train.labels < 10], base.train.labels[base.train.labels < 10]))
    whole = read_image_sequence("digits", shots=60)
    for task in whole.tasks:
        parts = [keys(split) for split in (task.train, task.val, task.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    inverted = next(task for task in whole.tasks if task.name == "inverted")
    assert not {(255 - image).tobytes() for image in inverted.train.images} & plain


def test_every_word_of_a_prompt_is_known(digits):
    words = digits_words()
    assert len(set(words)) == len(words)
    prompts = [prompt for task in (*digits.tasks, digits_base()) for prompt in task.prompts]
    assert {word for prompt in prompts for word in prompt.replace(".", " .").split()} <= set(words)


def test_the_seed_chooses_what_is_shown_in_training_alone(digits):
    again, other = read_image_sequence("digits"), read_image_sequence("digits", seed=1)
    for first, same, different in zip(digits.tasks, again.tasks, other.tasks, strict=True):
        assert np.array_equal(first.train.images, same.train.images)
        assert not np.array_equal(first.train.images, different.train.images)
        assert np.array_equal(first.test.images, different.test.images)


def test_few_shot_takes_as_many_of_each_class():
    labels = np.array([0] * 5 + [1] * 2 + [2] * 9)
    chosen = few_shot(labels, 4, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4]
    assert len(set(chosen[:4])) == 4  # a class that has enough shows none twice
    assert set(chosen[4:8]) <= {5, 6}
    assert np.array_equal(chosen, few_shot(labels, 4, seed=3))
    assert not np.array_equal(chosen, few_shot(labels, 4, seed=4))


def test_a_shortened_split_keeps_the_shares_of_the_classes():
    labels = np.repeat([0, 1], [60, 30])
    short = shortened(ImageSplit(np.arange(90), labels), 30)
    assert np.bincount(short.labels).tolist() == [20, 10]
    assert [int(image) for image in short.images] == sorted(int(image) for image in short.images)
    assert all(labels[image] == label for image, label in zip(short.images, short.labels, strict=True))
    assert len(shortened(short, 31)) == 30


def split(labels: list[int], images: int | None = None) -> ImageSplit:
    count = len(labels) if images is None else images
    return ImageSplit(np.zeros((count, 2, 2, 3), np.uint8), np.asarray(labels, dtype=np.int64))


def task(name: str = "t", **changes) -> ImageTask:
    parts = {"train": split([0, 1]), "val": split([]), "test": split([1, 0])}
    return ImageTask(name, **{**parts, "classes": ("cat", "dog"), "template": "a {}.", **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "a picture"}, "needs {} once"),
        ({"classes": ("cat", "cat")}, "class 'cat' is there twice"),
        ({"classes": ()}, "no classes"),
        ({"train": split([0, 1], images=3)}, "train has 3 images and 2 labels"),
        ({"val": split([2])}, "val has the label 2, but there are 2 classes"),
        ({"train": split([0])}, "train has no image of 1 of the 2 classes, such as 'dog'"),
        ({"test": split([1])}, "test has no image of 1 of the 2 classes, such as 'cat'"),
    ],
)
def test_a_task_that_does_not_hold_together_is_refused(changes, words):
    with pytest.raises(DataError) as caught:
        task(**changes)
    assert words in str(caught.value)


def test_a_sequence_that_does_not_hold_together_is_refused():
    with pytest.raises(DataError, match="two tasks have one name"):
        ImageSequence("s", "1", (task("a"), task("a")), {"x": ("a", "a")})
    with pytest.raises(DataError, match="has no order"):
        ImageSequence("s", "1", (task("a"),), {})
    with pytest.raises(DataError, match=r"order 'x' \(a\) has to have each of the tasks a, b once"):
        ImageSequence("s", "1", (task("a"), task("b")), {"x": ("a",)})
    whole = ImageSequence("s", "1", (task("a"), task("b")), {"I": ("b", "a"), "II": ("a", "b")})
    assert [one.name for one in whole.ordered("I")] == ["b", "a"]
    with pytest.raises(ConfigError, match="no order 'III': orders are I, II; did you mean 'II'"):
        whole.ordered("III")


def mirror(folder: Path, names: tuple[str, ...], classes: tuple[str, ...] = ("big_cat", "dog")) -> Path:
    """Image folders with images that tell which they are: red is the class, green the number."""
    for name in names:
        parts = {"train": 3, "test": 2} | ({"validation": 1} if name == "aircraft" else {})
        for part, count in parts.items():
            for label, word in enumerate(classes):
                where = folder / name / part / word
                where.mkdir(parents=True)
                for number in range(count):
                    Image.new("RGB", (4, 4), (label * 100, number * 50, 7)).save(where / f"{number}.png")
    return folder


def test_x_tail_is_read_from_image_folders(tmp_path):
    names = ORDERS["x-tail"]["I"]
    sequence = read_image_sequence("x-tail", shots=2, path=str(mirror(tmp_path, names)))
    assert [one.name for one in sequence.ordered("II")] == list(ORDERS["x-tail"]["II"])
    for one in sequence.tasks:
        assert one.classes == ("big cat", "dog")
        assert one.prompts[0] == TEMPLATES[one.name].format("big cat")
        assert [len(one.train), len(one.val), len(one.test)] == [4, 2 * 2 if one.name == "aircraft" else 0, 4]
        for part in (one.train, one.val, one.test):
            for image, label in zip(part.images, part.labels, strict=True):
                assert image.getpixel((0, 0))[0] == label * 100
    assert len({image.getpixel((0, 0)) for image in sequence.tasks[0].train.images}) == 4


def test_published_orders():
    """As in ZSCL's and RAIL's papers; the alphabetical ones also in their scripts."""
    words = {"oxford_pet": "oxfordpet", "stanford_cars": "stanfordcars"}
    told = {
        ("x-tail", "I"): "Aircraft Caltech101 DTD EuroSAT Flowers Food MNIST OxfordPet StanfordCars SUN397",
        ("x-tail", "II"): "StanfordCars Aircraft OxfordPet Food SUN397 MNIST Flowers DTD Caltech101 EuroSAT",
        ("mtil", "I"): "Aircraft Caltech101 CIFAR100 DTD EuroSAT Flowers Food MNIST OxfordPet StanfordCars SUN397",
        ("mtil", "II"): "StanfordCars Food MNIST OxfordPet Flowers SUN397 Aircraft Caltech101 DTD EuroSAT CIFAR100",
    }
    for (name, order), text in told.items():
        assert [words.get(task, task) for task in ORDERS[name][order]] == text.lower().split()


def test_files_that_do_not_fit_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="set path to a folder"):
        read_image_sequence("mtil")
    with pytest.raises(ConfigError, match="needs no path"):
        read_image_sequence("digits", path="x")
    with pytest.raises(ConfigError, match=r"unknown image sequence 'digts'.*did you mean 'digits'"):
        read_image_sequence("digts")
    mirror(tmp_path, ("aircraft", "dtd"))
    with pytest.raises(DataError, match="needs 9 more image folders there, caltech101, cifar100"):
        read_image_sequence("mtil", path=str(tmp_path))
    extra = tmp_path / "dtd" / "test" / "zebra"
    extra.mkdir()
    Image.new("RGB", (4, 4)).save(extra / "0.png")
    with pytest.raises(DataError, match="train has no image of 1 of the 3 classes, such as 'zebra'"):
        _read("dtd", str(tmp_path), True, 2, None, 0)
    (tmp_path / "aircraft" / "test").rename(tmp_path / "aircraft" / "held")
    with pytest.raises(DataError, match=r"aircraft: .*no test part"):
        _read("aircraft", str(tmp_path), True, 2, None, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: not read as an image folder"):
        _read("empty", str(tmp_path), True, 2, None, 0)


def test_the_command_line_knows_them_by_name() -> None:
    from moelora.data.image_sequences import IMAGE_SEQUENCES
    from moelora.image_config import IMAGE_SEQUENCE_NAMES

    assert set(IMAGE_SEQUENCE_NAMES) == set(IMAGE_SEQUENCES)
