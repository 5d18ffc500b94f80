"""Continual learning of CLIP: loss, sites in both encoders, what is left of the backbone, and whole runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import clip_runs
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moelora
from moelora import clip_small
from moelora.clip import clip_loss, load_clip, unit
from moelora.config import load_recipe
from moelora.data import image_sequences
from moelora.data.image_digits import digits_base
from moelora.errors import ConfigError, DataError, UserError
from moelora.evaluation.clip import image_embeddings, right_answers, text_embeddings
from moelora.trainers.clip import ClipTrainer, PictureTask
from moelora.trainers.continual import SECONDS
from moelora.trainers.continual_methods import CONTINUAL_METHODS


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_runs.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image_sequences.IMAGE_SEQUENCES, "tiny", clip_runs.read_tiny)


# -- the loss ------------------------------------------------------------------------------------------------------


def published_loss(image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, seen: int) -> torch.Tensor:
    """As XTAIL/models/moram.py has it: ``text`` holds the classes of all tasks so far, earlier ones are masked."""
    logits = 7.0 * image @ text.T
    if seen:
        logits = torch.cat([torch.full_like(logits[:, :seen], float("-inf")), logits[:, seen:]], dim=1)
    of_images = F.cross_entropy(logits, labels + seen)
    shown = torch.eq((labels + seen).view(-1, 1), torch.arange(len(text)).view(1, -1)).float().T
    return of_images + F.cross_entropy(7.0 * text @ image.T, shown)


@pytest.mark.parametrize("seen", [0, 4])
def test_the_loss_is_that_of_the_released_code(seen):
    image, text = unit(torch.randn(6, 5)).requires_grad_(), unit(torch.randn(seen + 3, 5)).requires_grad_()
    labels = torch.tensor([0, 2, 2, 0, 0, 2])  # the class 1 is in no image
    wanted = published_loss(image, text, labels, seen)
    wanted_gradients = torch.autograd.grad(wanted, [image, text])
    given = clip_loss(image, text[seen:], torch.tensor(7.0), labels, seen)
    gradients = torch.autograd.grad(given, [image, text])
    torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)
    assert not gradients[1][:seen].any()


# -- the model -----------------------------------------------------------------------------------------------------


def inputs(clip, task):
    return {**clip.texts(task.prompts), "pixel_values": clip.pixels(list(task.test.images))}


def test_experts_sit_in_both_encoders():
    model, _ = clip_runs.attached()
    towers = [name.partition(".")[0] for name in model.containers()]
    assert towers.count("text_model") == towers.count("vision_model") == 2 * len(clip_runs.TARGETS)


def test_when_all_atoms_are_silent_the_backbone_is_left_bitwise():
    model, clip = clip_runs.attached(scale=0.5)
    given = inputs(clip, clip_runs.build_tasks()[0])
    model.eval()
    with torch.no_grad():
        with model.disable_experts():
            plain = model(**given).logits_per_image
        assert not torch.equal(model(**given).logits_per_image, plain)
        # 1 is the largest share of a token's norm that an atom can have; so above it none speaks.
        for container in model.containers().values():
            container.router.config = container.router.config.model_copy(update={"threshold": 1.01})
        assert torch.equal(model(**given).logits_per_image, plain)
        assert torch.equal(model(**given).text_embeds, clip.model(**given).text_embeds)
        model.train()  # the threshold is of evaluation
        assert not torch.equal(model(**given).logits_per_image, plain)


def test_what_is_said_once_of_a_batch_holds_for_texts_and_images():
    """There are two texts and six images, so that a row for each could be meant of one of the two only."""
    model, clip = clip_runs.attached("per_task", scale=0.5)
    model.begin_task()
    model.eval()
    given = inputs(clip, clip_runs.build_tasks()[0])
    assert len(given["input_ids"]) != len(given["pixel_values"])
    with torch.no_grad():
        first = model(**given, task_ids=torch.tensor([0]))
        fresh = model(**given, task_ids=torch.tensor([1]))
        with model.disable_experts():
            plain = model(**given)
    for part in ("text_embeds", "image_embeds"):
        assert torch.equal(fresh[part], plain[part])  # the second task's experts are still zero
        assert not torch.allclose(first[part], plain[part])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
def test_a_backbone_of_four_bits_carries_experts(backbone):
    clip = load_clip(backbone, quantization="nf4")
    assert "Linear4bit" in {type(module).__name__ for module in clip.model.modules()}
    model = moelora.attach(clip.model, {"sites": [{"target": clip_runs.TARGETS, **clip_runs.SITES["moram"]}]})
    made = model(**inputs(clip, clip_runs.build_tasks()[0]))
    clip_loss(made.image_embeds, made.text_embeds, torch.tensor(5.0), torch.tensor([0, 0, 0, 1, 1, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_what_is_no_clip_model_is_refused(backbone_folder):
    with pytest.raises(UserError, match="is a model of type 'llama', not a CLIP model"):
        load_clip(backbone_folder)
    _, clip = clip_runs.attached()
    with pytest.raises(UserError, match="a prompt has 22 tokens, at most 16 fit"):
        clip.texts(["a", "a " * 20])


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_a_plain_loop():
    model, clip = clip_runs.attached(scale=0.5)
    tasks = clip_runs.build_tasks()
    prompts = [prompt for task in tasks for prompt in task.prompts]
    model.eval()
    for place, task in enumerate(tasks):
        first = sum(len(other.classes) for other in tasks[:place])
        wanted = []
        for image, label in zip(task.test.images, task.test.labels, strict=True):
            with torch.no_grad():
                logits = model(**clip.texts(prompts), pixel_values=clip.pixels([image])).logits_per_image
            wanted.append(float(logits.argmax() == first + label))
        assert right_answers(model, clip, task, tasks, batch_size=4) == wanted
        assert right_answers(model, clip, task, tasks, indices=[1, 2], batch_size=1) == wanted[1:3]
    assert right_answers(model, clip, tasks[2], [tasks[2]]) == [1.0] * 3  # it has one class
    with pytest.raises(ConfigError, match="classes of 'red' are not among those asked about, of noisy, photos"):
        right_answers(model, clip, tasks[0], tasks[1:])


def test_embeddings_do_not_depend_on_how_they_are_cut():
    model, clip = clip_runs.attached(scale=0.5)
    task = clip_runs.build_tasks()[1]
    model.eval()
    with torch.no_grad():
        whole = model(**inputs(clip, task))
    torch.testing.assert_close(text_embeddings(model, clip, task.prompts, 2), whole.text_embeds)
    torch.testing.assert_close(image_embeddings(model, clip, task.test.images, 2), whole.image_embeds)


# -- the small model -----------------------------------------------------------------------------------------------


def test_the_small_model_learns_follows_its_seed_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_small, "STEPS", 20)
    monkeypatch.setenv("MOELORA_CACHE", str(tmp_path))
    clip = load_clip("digits-clip", quantization=None)
    assert moelora.backbone.backbone_config(clip.model).name == "digits-clip"
    base = digits_base()
    right = np.mean(right_answers(clip.model, clip, base, [base]))
    assert right > 2 / len(base.classes)
    again = clip_small.train_small(0)
    monkeypatch.setattr(clip_small, "STEPS", 0)
    kept = load_clip("digits-clip", quantization=None)  # would be another if it were trained again
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
        assert torch.equal(tensor, kept.model.state_dict()[name])


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MoRAM that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_sequences.IMAGE_SEQUENCES, "tiny", clip_runs.read_tiny)
        return clip_runs.run(clip_runs.recipe(tmp_path_factory.mktemp("whole"), backbone))


def test_a_run_leaves_the_matrix_and_older_atoms_as_they_were(whole):
    tasks = list(clip_runs.CLASSES)
    for number in range(4):
        scores = json.loads((whole / f"stage-{number}" / "scores.json").read_text())["tasks"]
        assert [len(scores[task]["items"]) for task in tasks] == [6, 9, 3]
    assert (whole / "R.json").is_file()
    for number in (1, 2):
        before, after = (clip_runs.tensors(whole / f"stage-{n}") for n in (number, number + 1))
        factors = {name.removesuffix("lora_A") for name in after if name.endswith("old_lora_A")}
        factors = {name.removesuffix("old_") for name in factors}
        assert len(factors) == 24
        for site in factors:
            old_A, old_B = ([before[f"{site}old_{part}"]] if number > 1 else [] for part in ("lora_A", "lora_B"))
            assert torch.equal(after[f"{site}old_lora_A"], torch.cat([*old_A, before[f"{site}lora_A"]]))
            assert torch.equal(after[f"{site}old_lora_B"], torch.cat([*old_B, before[f"{site}lora_B"]], dim=1))
    last = clip_runs.tensors(whole)
    assert any(tensor.any() for name, tensor in last.items() if name.endswith(".lora_B") and "text_model" in name)
    assert any(tensor.any() for name, tensor in last.items() if name.endswith(".lora_B") and "vision_model" in name)


class Stop(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(whole, backbone, tmp_path, monkeypatch):
    values = clip_runs.recipe(tmp_path, backbone)
    step = ClipTrainer.training_step

    def stopping(self, *args):
        if self.state.global_step == 2 and str(self.args.output_dir).endswith("stage-2"):
            raise Stop
        return step(self, *args)

    monkeypatch.setattr(ClipTrainer, "training_step", stopping)
    with pytest.raises(Stop):
        clip_runs.run(values)
    stopped = json.loads((tmp_path / "run" / "stage-2" / "checkpoint-2" / "trainer_state.json").read_text())
    before = stopped["stateful_callbacks"][SECONDS]
    assert before > 0
    monkeypatch.setattr(ClipTrainer, "training_step", step)
    started = time.monotonic()
    folder = clip_runs.run(values, resume=True)
    took = json.loads((folder / "stage-2" / "growth.json").read_text())["seconds"]
    assert before < took < before + time.monotonic() - started
    wanted, given = clip_runs.tensors(whole), clip_runs.tensors(folder)
    assert wanted.keys() == given.keys()
    assert all(torch.equal(wanted[name], given[name]) for name in wanted)
    for number in range(4):
        one, other = ((run / f"stage-{number}" / "scores.json").read_text() for run in (whole, folder))
        assert one == other


@pytest.mark.parametrize("method", ["per_task", "moe_adapter", {"kind": "replay", "budget": 2}, "joint"])
def test_other_methods_run_on_images(method, backbone, tmp_path):
    values = clip_runs.recipe(tmp_path, backbone, method)
    values["trainer"]["args"].update(max_steps=1, save_strategy="no")
    values["trainer"]["among"] = "own"
    folder = clip_runs.run(values)
    last = 1 if method == "joint" else 3
    scores = json.loads((folder / f"stage-{last}" / "scores.json").read_text())["tasks"]
    assert scores["photos"]["score"] == 1.0  # among its own classes, of which there is one


def trainer(tmp_path, method, number):
    model, clip = clip_runs.attached("joint")
    tasks = [PictureTask(place, task) for place, task in enumerate(clip_runs.build_tasks())]
    kind = CONTINUAL_METHODS.get(method)
    made = kind(kind.Config.parse({"kind": method}), tasks, 0)
    args = load_recipe(clip_runs.recipe(tmp_path, tmp_path)).trainer.training_arguments(tmp_path, 0)
    images = [task.images for task in tasks]
    return ClipTrainer(model, args, clip=clip, tasks=images, pictures=made.examples(number), method=made)


def test_a_stage_has_the_classes_of_its_images_and_masks_the_others(tmp_path):
    own = trainer(tmp_path, "sequential", 2)
    assert (own.places, own.seen, len(own.texts["input_ids"])) == ([1], 2, 3)
    replayed = trainer(tmp_path, "replay", 2)
    assert (replayed.places, replayed.seen, len(replayed.texts["input_ids"])) == ([0, 1], 0, 5)
    pictures = [replayed.train_dataset[0], replayed.train_dataset[-1]]
    batch = replayed.collate(pictures)
    assert batch["labels"].tolist() == [2 + pictures[0].label, pictures[1].label]
    assert torch.equal(batch["pixel_values"][1:], replayed.clip.pixels(pictures[1].split.take([pictures[1].index])))
    with pytest.raises(DataError, match="no images to learn from"):
        ClipTrainer(replayed.model, clip=replayed.clip, tasks=[], pictures=[])


def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path):
    values = clip_runs.recipe(tmp_path, tmp_path / "none")
    with pytest.raises(ConfigError, match="'clip' learns a sequence of image tasks, but the data are none"):
        clip_runs.run({**values, "data": None})
    with pytest.raises(ConfigError, match=r"needs experts.kind 'rank1', but mixture.sites.0 has 'lora'"):
        clip_runs.run({**values, "mixture": {"sites": [{"target": "fc1", "experts": clip_runs.LORA}]}})
    with pytest.raises(ConfigError, match="no order 'z'"):
        clip_runs.run({**values, "data": {"kind": "images", "name": "tiny", "order": "z"}})


def test_the_published_recipe_has_the_released_values():
    path = Path(__file__).parents[2] / "scripts" / "published" / "clip" / "moram_xtail.yaml"
    made = load_recipe(path)
    args = made.trainer.training_arguments("nowhere", made.seed)
    assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (500, 64, 5e-4)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.9999, 0.0, 0.0)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("cosine", 0)
    [site] = made.mixture.sites
    assert (site.router.top_k, site.router.temperature, site.router.threshold) == (16, 0.01, 0.2)
    assert (site.experts.ranks, site.experts.scales) == ((16,), (1.0,))
    assert (made.data.shots, made.data.order, made.trainer.among) == (16, "I", "all")
