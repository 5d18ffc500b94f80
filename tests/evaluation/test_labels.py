"""Scores without generation: likelihoods of options and letters, exact match by teacher forcing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from questions import build_model, examples_of, write_questions

from moelora import MoELoRAModel
from moelora.analysis import RoutingRecorder
from moelora.data import ChatFormat, Example
from moelora.data.options import read_options
from moelora.errors import ConfigError, DataError
from moelora.evaluation import (
    generate_answers,
    likelihoods,
    score_labels,
    score_options,
    teacher_forced_match,
)
from moelora.evaluation.labels import lettered
from moelora.evaluation.likelihood import Answer


@pytest.fixture(scope="module")
def model(backbone_folder: Path) -> MoELoRAModel:
    return build_model(backbone_folder)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return examples_of(write_questions(tmp_path_factory.mktemp("questions")))


def by_hand(model: Any, prompt: list[int], answer: list[int]) -> tuple[float, list[int]]:
    """One answer alone: no padding, no sharing, all logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).sum()), logits.argmax(-1).tolist()


def rows_run(model: Any) -> tuple[list[int], list[torch.Size], list[Any]]:
    """The rows of each forward from now on, and what the output layer sees."""
    rows: list[int] = []
    heads: list[torch.Size] = []
    handles = [
        model.backbone.model.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        ),
        model.backbone.lm_head.register_forward_pre_hook(lambda _, args: heads.append(args[0].shape)),
    ]
    return rows, heads, handles


def test_likelihoods_are_those_of_a_plain_loop(model: MoELoRAModel) -> None:
    generator = torch.Generator().manual_seed(0)
    answers = []
    for number, (length, tokens) in enumerate([(5, 1), (20, 3), (2, 7), (20, 1), (9, 2), (1, 1)]):
        ids = torch.randint(4, 260, (length + tokens,), generator=generator).tolist()
        answers.append(Answer(ids[:length], ids[length:], f"task{number % 2}"))
    # The same beginning, answers of several lengths.
    answers += [replace(answers[1], tokens=[*answers[1].tokens[:2], 77]), replace(answers[1], tokens=[9])]
    answers.append(Answer(answers[1].prompt + answers[1].tokens[:1], [answers[1].tokens[1], 78], answers[1].task))
    seen: list[tuple[int, int]] = []
    found = likelihoods(model, answers, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    for answer, likelihood in zip(answers, found, strict=True):
        logprob, best = by_hand(model, answer.prompt, answer.tokens)
        assert likelihood.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5)
        assert likelihood.best == best
    assert seen[-1][0] == seen[-1][1] and len(seen) > 1


def test_single_tokens_after_one_prompt_cost_one_row_and_one_position(model: MoELoRAModel) -> None:
    rows, heads, handles = rows_run(model)
    answers = [Answer(prompt, [token], "t") for prompt in ([5, 6, 7], [8, 9]) for token in (20, 21, 22)]
    found = likelihoods(model, answers)
    for handle in handles:
        handle.remove()
    assert rows == [2] and heads == [torch.Size([2, 1, 32])]
    assert [a.logprob for a in found] == pytest.approx([by_hand(model, a.prompt, a.tokens)[0] for a in answers])


@pytest.mark.parametrize(
    ("router", "read"),
    [
        # Two prompts of 3 and 20 tokens, then what the answers do not end with: two beginnings after each.
        ({"kind": "topk", "top_k": 2, "init_std": 0.5}, [(2, 20), (4, 3)]),
        ({"kind": "xlora"}, [(2, 20), (4, 3)]),
        # Capacity counts the tokens of a row, so every row is read as one.
        ({"kind": "switch", "expert_capacity": 3}, [(6, 23)]),
    ],
)
def test_a_prompt_with_longer_answers_is_read_once(
    backbone_folder: Path, router: dict[str, Any], read: list[tuple[int, int]]
) -> None:
    model = build_model(backbone_folder, router=router)
    long, short = [*range(10, 30)], [40, 41, 42]
    endings = [(7,), (7, 8), (9, 7, 8, 6)]
    answers = [Answer(prompt, [*tokens], "t") for prompt in (long, short) for tokens in endings]
    answers.append(Answer(long, [7, 200], "t"))
    shapes: list[tuple[int, int]] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    recorder = RoutingRecorder(model, ["t"])
    found = likelihoods(model, answers, recorder=recorder)
    hook.remove()
    assert shapes == read
    for answer, likelihood in zip(answers, found, strict=True):
        logprob, best = by_hand(model, answer.prompt, answer.tokens)
        assert likelihood.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5) and likelihood.best == best
    # Once each: both prompts and 0 + 1 + 3 more tokens of each; or for each of three beginnings anew.
    once, anew = 23 + 2 * (0 + 1 + 3), 3 * 23 + 2 * (0 + 1 + 3)
    assert recorder.result().sites[0].tokens == (once if len(read) > 1 else anew,)


def test_mode_and_caches_are_as_before(model: MoELoRAModel) -> None:
    model.train()
    likelihoods(model, [Answer([5, 6], [7], "t")])
    assert model.training
    model.eval()


def test_options_are_chosen_by_sum_or_by_length(model: MoELoRAModel, examples: list[Example]) -> None:
    found = score_options(model, model.tokenizer, examples, batch_size=4)
    chat = ChatFormat(model.tokenizer)
    for place, example in enumerate(examples):
        sums = []
        for option in example.choices:
            tokens = chat.answer_ids(replace(example, answer=option))[:-1]
            assert model.tokenizer.decode(tokens) == f" {option}"
            sums.append(by_hand(model, chat.prompt_ids(example), tokens)[0])
        assert found.logprobs[place] == pytest.approx(sums, rel=1e-5, abs=1e-4)
        assert found.total.answers[place] == example.choices[sums.index(max(sums))]
        normed = [value / len(option) for value, option in zip(sums, example.choices, strict=True)]
        assert found.normalised.answers[place] == example.choices[normed.index(max(normed))]
        assert found.total.items[place] == (found.total.answers[place] == example.answer)
    assert found.total.answers != found.normalised.answers  # else this test tells the two apart in nothing
    assert {name: task.count for name, task in found.total.tasks.items()} == {"animals": 2, "facts": 3}


def test_labels_are_the_largest_logits_of_letters(model: MoELoRAModel, examples: list[Example]) -> None:
    rows, _, handles = rows_run(model)
    report = score_labels(model, model.tokenizer, [replace(e, prompt=e.prompt[:-8]) for e in examples], batch_size=8)
    for handle in handles:
        handle.remove()
    # The byte tokenizer makes two tokens of " A", the first alike: still one row for each question.
    assert rows == [5]
    for example, answer in zip(examples, report.answers, strict=True):
        asked = replace(example, prompt=example.prompt[:-8])
        text = lettered(asked)
        assert text.startswith(f"{asked.prompt}\nA. {example.choices[0]}\nB. ") and text.endswith("\nAnswer:")
        ids = model.tokenizer(text + " ")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        letters = [model.tokenizer(letter)["input_ids"][0] for letter in "ABCD"[: len(example.choices)]]
        assert answer == example.choices[int(logits[letters].argmax())]


def test_questions_without_options_are_refused(model: MoELoRAModel, examples: list[Example]) -> None:
    bare = replace(examples[0], choices=())
    for way in (score_options, score_labels):
        with pytest.raises(DataError, match=r"task 'animals' has questions without options.*data\.columns\.options"):
            way(model, model.tokenizer, [*examples, bare])
        with pytest.raises(DataError, match="no examples to answer"):
            way(model, model.tokenizer, [])
    many = replace(examples[0], choices=tuple(map(str, range(27))))
    with pytest.raises(DataError, match="a question has 27 options, more than letters"):
        score_labels(model, model.tokenizer, [many])
    with pytest.raises(ConfigError, match="this is an encoder-decoder"):
        likelihoods(SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True)), [Answer([1], [2], "t")])


# -- exact match -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(backbone_folder: Path) -> MoELoRAModel:
    """A model that says letters, and at times that it is done."""
    model = build_model(backbone_folder, chat=True)
    said = model.tokenizer("abcdefgh")["input_ids"]
    with torch.no_grad():
        head = model.backbone.lm_head.weight
        silent = torch.ones(len(head), dtype=torch.bool)
        silent[[*said, model.tokenizer.eos_token_id]] = False
        head[silent] = 0
        head[model.tokenizer.eos_token_id] *= 2
    return model


def test_exact_match_is_that_of_generation(speaker: MoELoRAModel) -> None:
    room = 12
    questions = [Example("tell me " + "more " * (n % 4) + str(n), "abc", f"task{n % 2}") for n in range(24)]
    made = generate_answers(speaker, speaker.tokenizer, questions, max_new_tokens=room, batch_size=5)
    ended = [n for n, text in enumerate(made) if 1 < len(text) < room]
    assert len(ended) >= 4, made
    # What it says, a part of it, more than it, and something else.
    examples = []
    for n in ended:
        text = made[n]
        for answer in (text, text[:-1], text + "a", "h" + text[1:], text[:-1] + ("a" if text[-1] == "b" else "b")):
            examples.append(replace(questions[n], answer=answer))
    report = teacher_forced_match(speaker, speaker.tokenizer, examples, batch_size=7)
    again = generate_answers(speaker, speaker.tokenizer, examples, max_new_tokens=room, batch_size=5)
    expected = [float(text == example.answer) for text, example in zip(again, examples, strict=True)]
    assert report.items == expected and 0 < sum(expected) < len(expected)
    for text, begun, right in zip(again, report.answers, expected, strict=True):
        assert begun == text if right else text.startswith(begun)
    assert set(report.tasks) == {example.task for example in examples}


def test_any_token_that_stops_generation_ends_an_answer(speaker: MoELoRAModel) -> None:
    question = Example("tell me 1", "abc", "t")
    stop = speaker.tokenizer("z")["input_ids"][0]
    before = speaker.generation_config.eos_token_id
    head = speaker.backbone.lm_head.weight
    saved = head.detach().clone()
    try:
        speaker.generation_config.eos_token_id = [before, stop]
        with torch.no_grad():  # z in the place of the template's end
            head[stop], head[before] = saved[before], 0
        made = generate_answers(speaker, speaker.tokenizer, [question], max_new_tokens=40)[0]
        assert 0 < len(made) < 40
        right = replace(question, answer=made)
        assert teacher_forced_match(speaker, speaker.tokenizer, [right]).items == [1.0]
        speaker.generation_config.eos_token_id = before
        assert teacher_forced_match(speaker, speaker.tokenizer, [right]).items == [0.0]
    finally:
        speaker.generation_config.eos_token_id = before
        with torch.no_grad():
            head.copy_(saved)


def test_no_examples(model: MoELoRAModel) -> None:
    with pytest.raises(DataError, match="no examples to answer"):
        teacher_forced_match(model, model.tokenizer, [])


# -- routing -----------------------------------------------------------------------------------------------------------


def test_routing_is_counted_by_task_and_changes_nothing(model: MoELoRAModel, examples: list[Example]) -> None:
    chat = ChatFormat(model.tokenizer)
    plain = teacher_forced_match(model, model.tokenizer, examples, batch_size=2)
    recorder = RoutingRecorder(model, ["animals", "facts"])
    assert teacher_forced_match(model, model.tokenizer, examples, batch_size=2, recorder=recorder) == plain
    stats = recorder.result()
    wanted = {"animals": 0, "facts": 0}
    for example in examples:  # the last token of an answer predicts nothing, so it is not read
        wanted[example.task] += len(chat.prompt_ids(example)) + len(chat.answer_ids(example)) - 1
    assert stats.tasks == ("animals", "facts")
    for site in stats.sites:
        assert site.tokens == (wanted["animals"], wanted["facts"])
        assert site.load_NE.sum(axis=1).tolist() == [2.0 * count for count in site.tokens]
    # One task alone decides as it did among the others.
    alone = RoutingRecorder(model, ["facts"])
    teacher_forced_match(model, model.tokenizer, [e for e in examples if e.task == "facts"], recorder=alone)
    assert [site.selections[0] for site in alone.result().sites] == [site.selections[1] for site in stats.sites]


def test_generation_counts_by_task_too(model: MoELoRAModel, examples: list[Example]) -> None:
    recorder = RoutingRecorder(model, ["animals", "facts"])
    generate_answers(model, model.tokenizer, examples, max_new_tokens=1, recorder=recorder)
    chat = ChatFormat(model.tokenizer)
    prompts = [sum(len(chat.prompt_ids(e)) for e in examples if e.task == task) for task in ("animals", "facts")]
    assert list(recorder.result().sites[0].tokens) == prompts
    with pytest.raises(DataError, match="the recorder knows no task 'facts', but animals"):
        generate_answers(model, model.tokenizer, examples, recorder=RoutingRecorder(model, ["animals"]))


# -- cells of a table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "answer", "right"),
    [
        (["x", "y", "z"], 2, "z"),
        (["x", "y"], "y", "y"),
        (["x", "y"], "B", "y"),
        (["B", "A"], "A", "A"),  # a text before a letter
        ('["x", "y"]', "A", "x"),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", "y"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "A", "x"),
        (["0", "1"], 0, "0"),
        ([1.5, 2], "2", "2"),
    ],
)
def test_options_of_a_row(cell: Any, answer: Any, right: str) -> None:
    options, text = read_options(cell, answer, "f: row 1")
    assert text == right and right in options


@pytest.mark.parametrize(
    ("cell", "answer", "message"),
    [
        ("x or y", "x", "must be a list of at least two texts"),
        (["x"], 0, "must be a list of at least two texts"),
        ({"text": ["x", "y"], "label": ["A"]}, "A", "must be a list"),
        (["x", None], 0, "an option is empty or is there twice: 'x', ''"),
        (["x", "x"], 0, "is there twice"),
        (["x", "y"], 2, r"the answer 2 is none of an index 0\.\.1, a letter, or a text of 'x', 'y'"),
        (["x", "y"], "C", "the answer 'C' is none of"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "C", "the answer 'C' is none of labels A, B"),
    ],
)
def test_a_row_without_a_right_option_is_refused(cell: Any, answer: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^f: row 7: .*{message}"):
        read_options(cell, answer, "f: row 7")
