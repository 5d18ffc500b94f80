"""Fifteen tasks of SuperNI (Super-NaturalInstructions) in two orders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .example import Example
from .sequence_files import find, read_json
from .sequence_tasks import SEQUENCES, Orders, SequenceReader, Task, apart, hold_out, make_task

RELEASED = "the folder CL_Benchmark/SuperNI of SAPT's repository, with task1572_samsum_summary/train.json and so on"
MAX_NEW_TOKENS = 50
TASKS = {
    number: f"task{number}_{name}"
    for number, name in {
        "002": "quoref_answer_generation",
        "073": "commonsenseqa_answer_generation",
        "181": "outcome_extraction",
        "363": "sst2_polarity_classification",
        "511": "reddit_tifu_long_text_summarization",
        "591": "sciq_answer_generation",
        "639": "multi_woz_user_utterance_generation",
        "748": "glucose_reverse_cause_event_detection",
        "875": "emotion_classification",
        "1290": "xsum_summarization",
        "1510": "evalution_relation_extraction",
        "1572": "samsum_summary",
        "1590": "diplomacy_text_generation",
        "1687": "sentiment140_classification",
        "1729": "personachat_generate_next",
    }.items()
}
ORDERS = {
    "1": "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875",
    "2": "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875",
}


@SEQUENCES.register("superni")
class SuperNI(SequenceReader):
    """Three tasks each of dialogue generation, information extraction, question answering, summarisation, sentiment.

    Tasks, orders, files and prompts are those of ``circle-hit/SAPT`` (Zhao et al. 2024), all read there: a file is one
    object with the list ``Definition``, of which the first is taken, and the list ``Instances`` of
    ``{"input": ..., "output": ...}``. Its ``dev.json`` is ``test.json`` once more, so validation examples are held out
    of the training ones instead. The metric is ROUGE-L for all tasks, and
    an answer has at most 50 new tokens (``--generation_max_length`` of its scripts).

    Where an instance has several outputs the first one is learnt, and the best of all counts in the score, as SuperNI's
    own evaluation has it; SAPT draws one at random for both. Instances without any text to learn (one of task 511) are
    left out.
    """

    version = "SAPT 2024"

    def orders(self) -> Orders:
        return {order: tuple(TASKS[number] for number in numbers.split()) for order, numbers in ORDERS.items()}

    def task(self, name: str) -> Task:
        config = self.config
        read = {split: self._read(find(config, f"{name}/{split}.json", RELEASED), name) for split in ("test", "train")}
        splits = apart(name, read)
        train, val = hold_out(splits["train"], config.val_size)
        return make_task(config, name, train, val, splits["test"], metric="rouge_l", max_new_tokens=MAX_NEW_TOKENS)

    def _read(self, file: Path, name: str) -> list[Example]:
        content = read_json(file)
        definition = content.get("Definition") if isinstance(content, Mapping) else None
        instances = content.get("Instances") if isinstance(content, Mapping) else None
        if not isinstance(definition, list) or not definition or not isinstance(instances, list):
            raise DataError(f"{file}: this should be one object with the lists Definition and Instances")
        made = (
            self._example(row, definition[0], name, f"{file}: instance {at}") for at, row in enumerate(instances, 1)
        )
        return [example for example in made if example.answer]

    def _example(self, row: Any, definition: str, name: str, place: str) -> Example:
        asked, output = (row.get("input"), row.get("output")) if isinstance(row, Mapping) else (None, None)
        references = [output] if isinstance(output, str) else output if isinstance(output, list) else []
        if not isinstance(asked, str) or not references or not all(isinstance(text, str) for text in references):
            raise DataError(f'{place}: this should be {{"input": a text, "output": a text or a list of texts}}')
        references = [text.strip() for text in references if text.strip()] or [""]
        prompt = (
            f"Definition: {definition.strip()}\n\nNow complete the following example -\nInput: {asked.strip()}\nOutput:"
        )
        return Example(prompt, references[0], name, self.config.system, {"references": references})
