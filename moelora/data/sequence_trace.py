"""TRACE: eight tasks for language models, from stance detection in Chinese to text simplification in German."""

from __future__ import annotations

from dataclasses import dataclass

from .sequence_files import find, read_rows
from .sequence_tasks import SEQUENCES, Orders, SequenceReader, Task, apart, make_task

RELEASED = "the folder of a TRACE release (LLM-CL-Benchmark_500, _1000 or _5000), with C-STANCE/train.json and so on"


MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class _Row:
    metric: str
    epochs: int
    classes: tuple[str, ...] = ()


TASKS = {
    "C-STANCE": _Row("exact", 2, ("A", "B", "C")),
    "FOMC": _Row("exact", 1, ("A", "B", "C")),
    "MeetingBank": _Row("rouge_l", 3),
    "Py150": _Row("edit_similarity", 2),
    "ScienceQA": _Row("first_character", 1),  # an answer is a letter and then its reasons
    "NumGLUE-cm": _Row("exact", 2),
    "NumGLUE-ds": _Row("exact", 2),
    "20Minuten": _Row("sari", 3),
}


@SEQUENCES.register("trace")
class Trace(SequenceReader):
    """TRACE (Wang et al. 2023, arXiv 2310.06762), in its one published order.

    The files are those of the release: ``TASK/train.json``, ``eval.json`` and ``test.json``, each a list of
    ``{"prompt": ..., "answer": ...}``. Tasks, order, files and metrics are those of ``BeyonderXX/TRACE``: accuracy for
    C-STANCE, FOMC, ScienceQA (of the letter) and NumGLUE, ROUGE-L for MeetingBank, edit similarity for Py150, SARI for
    20Minuten. The epochs are those of ``Artificer-AI-Lab/MoRAM``, whose repository has the release of 500 examples;
    TRACE's own scripts have 5, 3, 7, 5, 3, 5, 5, 7. An answer has at most 512 new tokens (``--max_ans_len`` of the
    scripts of both).

    Checked on the release of 500, but for MeetingBank's training file, which was not to be had. A few questions there
    are in two splits; training and validation leave them out, see
    :func:`~moelora.data.sequence_tasks.apart`. Known differences: white space around prompts and answers is left out,
    and ROUGE-L is that of ``rouge-score``, see :func:`~moelora.evaluation.task_metrics.rouge_l`.
    """

    version = "TRACE 2023"

    def orders(self) -> Orders:
        return {"a": tuple(TASKS)}

    def task(self, name: str) -> Task:
        row = TASKS[name]
        read = {
            split: read_rows(self.config, find(self.config, f"{name}/{file}.json", RELEASED), name)
            for split, file in (("test", "test"), ("val", "eval"), ("train", "train"))
        }
        splits = apart(name, read)
        return make_task(
            self.config,
            name,
            **splits,
            metric=row.metric,
            classes=row.classes,
            epochs=row.epochs,
            max_new_tokens=MAX_NEW_TOKENS,
        )
