"""Tasks of lm-evaluation-harness on a live mixture, and that label scoring finds the same numbers."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from questions import ROWS, build_model, examples_of, write_questions, write_task

from moelora import MoELoRAModel
from moelora.analysis import RoutingRecorder
from moelora.errors import ConfigError, DataError, UserError
from moelora.evaluation import load_tasks, run_tasks, score_options
from moelora.evaluation.harness import HarnessReport, compare_samples
from moelora.evaluation.lm_eval_model import MixtureLM

pytestmark = [
    # The harness leaves the closing of its data to the collector, and asks git where it is.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def chat(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def model(backbone_folder: Path) -> MoELoRAModel:
    return build_model(backbone_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, and the group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "all_questions", write_questions(folder))
    facts = folder / "facts"
    facts.mkdir()
    write_task(folder, "facts_only", write_questions(facts, [row for row in ROWS if row["kind"] == "facts"]))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [all_questions, facts_only]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


@pytest.fixture
def quick_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read the harness' own files takes seconds, and these tests name none of them."""
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **options: TaskManager(**{**options, "include_defaults": False})
    )


def logprobs(report: HarnessReport, task: str) -> list[list[float]]:
    samples = sorted(report.samples[task], key=lambda sample: sample["doc_id"])
    return [[float(response[0][0]) for response in sample["resps"]] for sample in samples]


def test_label_scoring_finds_the_numbers_of_the_harness(backbone_folder: Path, folder: Path, chat: bool) -> None:
    model = build_model(backbone_folder, chat)
    tasks = load_tasks([str(folder / "all_questions.yaml")])
    report = run_tasks(model, tasks, batch_size=4, chat_template=chat)
    ours = score_options(model, model.tokenizer, examples_of(folder / "questions.jsonl"), batch_size=3)
    for mine, theirs in zip(ours.logprobs, logprobs(report, "all_questions"), strict=True):
        # The harness takes the line break at the end of a chat prompt for a part of each option.
        shift = theirs[0] - mine[0]
        assert shift < -1 if chat else abs(shift) < 1e-4
        assert [value + shift * chat for value in mine] == pytest.approx(theirs, rel=1e-5, abs=1e-4)
    found = {metric.name: metric for metric in report.metrics()}
    count = len(ROWS)
    assert found["acc"].value == pytest.approx(sum(ours.total.items) / count)
    assert chat or found["acc_norm"].value == pytest.approx(sum(ours.normalised.items) / count)
    assert (found["acc"].questions, found["acc"].shots) == (count, 0)


def test_the_numbers_are_those_of_the_harness_own_adaptor(model: MoELoRAModel, folder: Path) -> None:
    path = str(folder / "all_questions.yaml")
    recorder = RoutingRecorder(model, ["all_questions"])
    plain, recorded = (run_tasks(model, load_tasks([path]), batch_size=3, recorder=each) for each in (None, recorder))
    assert plain.samples == recorded.samples and plain.results == recorded.results
    theirs: Any = simple_evaluate(
        HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=3),
        tasks=[path],
        task_manager=TaskManager(include_defaults=False),
    )
    assert plain.results["results"] == theirs["results"]
    other = HarnessReport(theirs, theirs["samples"])
    for mine, his in zip(logprobs(plain, "all_questions"), logprobs(other, "all_questions"), strict=True):
        assert mine == pytest.approx(his, rel=1e-5, abs=1e-4)


def test_padding_is_masked_even_where_a_real_token_is_the_padding(model: MoELoRAModel) -> None:
    lm = MixtureLM(model, batch_size=4)
    requests = [(None, [5, 6, 7, 8, 9], [10, 11]), (None, [5, 0], [0, 0, 4]), (None, [7], [0])]
    recorder = RoutingRecorder(model)
    with recorder:
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    # Rows without their last token: 6 + 4 + 1.
    assert {site.tokens for site in recorder.result().sites} == {(11,)}
    for (_, context, answer), (logprob, greedy) in zip(requests, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).sum()
        assert logprob == pytest.approx(float(own), rel=1e-5, abs=1e-5)
        assert greedy == (logits.argmax(-1).tolist() == answer)


def test_every_kind_of_request_is_counted_by_its_task_and_answered_in_order(model: MoELoRAModel) -> None:
    lm = MixtureLM(model, batch_size=2)

    def request(kind: Any, task: str, number: int, *arguments: Any) -> Instance:
        return Instance(kind, {}, arguments, number, metadata=(task, number, 1))

    rolling = [request("loglikelihood_rolling", "ab"[n % 2], n, "x" * (n + 3)) for n in range(4)]
    recorder = RoutingRecorder(model, ["a", "b"])
    with recorder:
        lm._recorder = recorder
        found = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx([HFLM.loglikelihood_rolling(lm, [each], disable_tqdm=True)[0] for each in rolling])
    assert recorder.result().sites[0].tokens == (3 + 5, 4 + 6)
    generate = [
        request("generate_until", "ab"[n % 2], n, "y" * (n + 3), {"until": ["zz"], "max_gen_toks": 1}) for n in range(4)
    ]
    recorder = RoutingRecorder(model, ["a", "b"])
    with recorder:
        lm._recorder = recorder
        texts = lm.generate_until(generate, disable_tqdm=True)
    assert texts == [HFLM.generate_until(lm, [each], disable_tqdm=True)[0] for each in generate]
    assert recorder.result().sites[0].tokens == (3 + 5, 4 + 6)


@pytest.mark.usefixtures("quick_index")
def test_a_group_limit_fewshot_and_tasks_of_a_folder(model: MoELoRAModel, folder: Path) -> None:
    recorder = RoutingRecorder(model, ["all_questions", "facts_only"])
    report = run_tasks(model, load_tasks([str(folder / "both.yaml")]), limit=2, recorder=recorder)
    values = {(metric.task, metric.name): metric for metric in report.metrics()}
    one, other, both = (values[task, "acc"] for task in ("all_questions", "facts_only", "both"))
    assert both.value == pytest.approx((one.value + other.value) / 2)  # type: ignore[operator]
    assert (one.questions, other.questions, both.questions) == (2, 2, None)
    assert recorder.result().tasks == ("all_questions", "facts_only")
    assert report.to_dict()["results"]["all_questions"]["acc,none"] == one.value
    named = load_tasks(["facts_only"], include_path=folder)
    assert named.names == ["facts_only"]
    shown = run_tasks(model, named, num_fewshot=1)
    assert [(m.shots, m.questions) for m in shown.metrics()] == [(1, 3), (1, 3)]
    assert "Answer: " in str(shown.samples["facts_only"][0]["arguments"])  # an answered question in the prompt


def test_differences_are_paired(model: MoELoRAModel, folder: Path) -> None:
    tasks = load_tasks([str(folder / "all_questions.yaml")])
    one = run_tasks(model, tasks)
    with model.disable_experts():
        other = run_tasks(model, tasks)
    assert logprobs(one, "all_questions") != logprobs(other, "all_questions")
    found = compare_samples(one, other)
    assert set(found) == {("all_questions", "acc", "none"), ("all_questions", "acc_norm", "none")}
    for (task, name, _), difference in found.items():
        values = [r.results["results"][task][f"{name},none"] for r in (one, other)]
        assert difference.difference == pytest.approx(values[0] - values[1])
        assert difference.low <= difference.difference <= difference.high
    assert all(vars(c) == {"difference": 0, "low": 0, "high": 0} for c in compare_samples(one, one).values())


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("moelora.evaluation.harness.import_module", lambda name: missing(name))
    with pytest.raises(UserError, match=r"not installed .*pip install 'moelora\[eval\]'"):
        load_tasks(["arc_easy"])


def test_an_unknown_task_and_one_whose_data_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    # A part of the harness' own files: to read all of them takes seconds.
    part = TaskManager(include_path=str(Path(lm_eval.__file__).parent / "tasks" / "arc"), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: part)
    with pytest.raises(ConfigError, match=r"has no task 'arc_eazy'.*'arc_easy'.*lm-eval ls tasks"):
        load_tasks(["arc_eazy"])
    with pytest.raises(DataError, match=r"task 'arc_easy': its data cannot be had: .*ai2_arc.* with a connection"):
        load_tasks(["arc_easy"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "cannot be read as a task: while parsing"),
        ("- a\n- b\n", "cannot be read as a task: Expected YAML dict"),
        ("dataset_path: json\n", "a task's file has a key `task` with its name .*but the keys are dataset_path"),
        ("include: nowhere.yaml\ntask: x\n", r"cannot be read as a task: .*nowhere\.yaml"),
        ("task: x\ndataset_path: json\noutput_type: unheard_of\n", "task '.*' cannot be made: "),
        (
            "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n",
            "its data cannot be had",
        ),
    ],
)
def test_a_file_that_is_no_task(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_tasks([str(path)])
    assert str(path) in str(caught.value)


def test_names_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "all_questions.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_tasks([str(tmp_path / "nothing.yaml")])
    with pytest.raises(ConfigError, match=r"runs task 'all_questions', which '.*' runs already: drop one"):
        load_tasks([path, path])
    with pytest.raises(ConfigError, match="no such folder"):
        load_tasks([path], include_path=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no task is named"):
        load_tasks([])
    with pytest.raises(ConfigError, match="task 'unsafe' runs code that the model writes"):
        load_tasks([str(write_task(tmp_path, "unsafe", folder / "questions.jsonl", unsafe_code=True))])
