"""The standard sequences of text classification: four, five or fifteen tasks."""

from __future__ import annotations

from dataclasses import replace

from ..errors import DataError
from .sequence_files import find, read_json, read_rows
from .sequence_tasks import SEQUENCES, Orders, SequenceReader, Task, apart, hold_out, make_task

RELEASED = "the folder CL_Benchmark of O-LoRA's repository, with SC/yelp/train.json and so on"
FOLDERS = {
    "yelp": "SC/yelp",
    "amazon": "SC/amazon",
    "imdb": "SC/IMDB",
    "sst2": "SC/SST-2",
    "agnews": "TC/agnews",
    "dbpedia": "TC/dbpedia",
    "yahoo": "TC/yahoo",
    "mnli": "NLI/MNLI",
    "cb": "NLI/CB",
    "rte": "NLI/RTE",
    "qqp": "QQP/QQP",
    "boolq": "BoolQA/BoolQA",
    "multirc": "MultiRC/MultiRC",
    "copa": "COPA/COPA",
    "wic": "WiC/WiC",
}
INSTRUCTIONS = {  # of a kind of task; the questions of COPA have theirs in them
    "SC": "What is the sentiment of the following paragraph?",
    "TC": "What is the topic of the following paragraph?",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false?",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence?",
}
MAX_NEW_TOKENS = 50
UNLABELLED = "-"  # where the annotators of MNLI did not agree; nothing to learn, and never right
ORDERS = {
    "1": "dbpedia amazon yahoo agnews",
    "2": "dbpedia amazon agnews yahoo",
    "3": "yahoo amazon agnews dbpedia",
    "4": "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
    "5": "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
    "6": "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic",
    "five-1": "yelp agnews dbpedia amazon yahoo",
    "five-2": "dbpedia yahoo agnews amazon yelp",
    "five-3": "yelp yahoo amazon dbpedia agnews",
    "five-4": "agnews yelp amazon yahoo dbpedia",
}


@SEQUENCES.register("text-cl")
class TextClassification(SequenceReader):
    """AGNews, Amazon, DBpedia, Yahoo and Yelp; with them IMDB and tasks of GLUE and SuperGLUE: fifteen in all.

    Orders 1 to 6 are numbered as in O-LoRA (Wang et al. 2023, arXiv 2310.14152): 1 to 3 have four tasks, 4 to 6 have
    fifteen. Orders ``five-1`` to ``five-4`` have all five of the older literature (de Masson d'Autume et al. 2019).
    Numbers are not the same in all papers: order 6 here is order 4 in SAPT, and order 4 here is its order 5.

    The files are those of ``cmnfriend/O-LoRA``: a list of ``{"sentence": ..., "label": ...}`` in ``train.json`` and
    ``test.json``, and the labels in ``labels.json``. Its ``dev.json`` is ``test.json`` once more, so validation
    examples are held out of the training ones instead. A prompt is the instruction, the labels as options, the sentence
    and ``Answer:``, as there. Its scripts put two lines with the names of the task and the data set in front of it,
    which are left out here because they tell the model the task. Scores are exact match as there, and an answer that is
    written has at most 50 new tokens (``--generation_max_length`` of its scripts). Rows without a label
    (``-``, of MNLI), which count as wrong there, are left out.

    Read in its repository: tasks, labels, prompts, orders 1 to 3, and the one that is 6 here. The numbers of 4 and 5,
    and the orders of five tasks, are from public scripts of other authors; the papers were not at hand.
    """

    version = "O-LoRA 2023"

    def orders(self) -> Orders:
        return {order: tuple(names.split()) for order, names in ORDERS.items()}

    def task(self, name: str) -> Task:
        config, folder = self.config, FOLDERS[name]
        labels_file = find(config, f"{folder}/labels.json", RELEASED)
        labels = read_json(labels_file)
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise DataError(f"{labels_file}: this should be a list of the labels' words")
        read = {
            split: read_rows(config, find(config, f"{folder}/{split}.json", RELEASED), name, "sentence", "label")
            for split in ("test", "train")
        }
        kind = folder.partition("/")[0]
        head = ""
        if kind in INSTRUCTIONS:
            head = f"{INSTRUCTIONS[kind]} Choose one from the option.\nOption: {', '.join(labels)} \n"
        asked = {
            split: [
                replace(example, prompt=f"{head}{example.prompt}\nAnswer:")
                for example in examples
                if example.answer != UNLABELLED
            ]
            for split, examples in read.items()
        }
        splits = apart(name, asked)
        train, val = hold_out(splits["train"], config.val_size)
        return make_task(
            config,
            name,
            train,
            val,
            splits["test"],
            metric="exact_match",
            classes=labels,
            max_new_tokens=MAX_NEW_TOKENS,
        )
