"""``moelora export``: LoRA adapters that others read, out of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, DataError
from .common import (
    AsJson,
    Backbone,
    CacheDir,
    Checkpoint,
    LocalFilesOnly,
    Overrides,
    Quantization,
    RecipeOption,
    Revision,
    Subfolder,
    Token,
    hub_options,
    load_model,
    print_json,
    read_questions,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from ..composition.divergence import Batch
    from ..composition.gguf import OutType
    from ..composition.pieces import Progress
    from ..data import Example, Splits
    from ..model import MoELoRAModel
    from .common import Questions

# What each option is for; given with anything else it would do nothing.
_FOR_EXPERTS = ("--names",)
_FOR_LORA = ("--rank", "--approximate", "--text", "--data", "--recipe", "--context", "KEY=VALUE")
_FOR_GGUF = ("--each", "--llama-cpp", "--base", "--outtype")


@dataclass(frozen=True)
class _Words:
    """The text of a file."""

    text: str
    tokens: int
    length: int

    def batches(self, tokenizer: Any, by_task: bool) -> tuple[list[Batch], list[Batch]]:
        from ..composition.divergence import split_text

        return split_text(tokenizer, self.text, self.length, self.tokens)


@dataclass(frozen=True)
class _Examples:
    """Questions and answers of a recipe."""

    splits: Splits
    tokens: int
    max_length: int

    def batches(self, tokenizer: Any, by_task: bool) -> tuple[list[Batch], list[Batch]]:
        train, test = (self._some(each, tokenizer, by_task) if each else [] for each in self.splits[:2])
        return train, test

    def _some(self, examples: list[Example], tokenizer: Any, by_task: bool) -> list[Batch]:
        """Eight at a time, until there is half of the tokens."""
        from ..data import Collator, tokenize

        rows, count = [], 0
        for row in tokenize(examples, tokenizer, self.max_length).rows:
            if count and count + len(row["input_ids"]) > self.tokens // 2:
                break
            count += len(row["input_ids"])
            rows.append(row)
        collate = Collator(tokenizer.pad_token_id, with_task_ids=by_task)
        return [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]


def export(
    path: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="Folder to write: new, or empty.")],
    overrides: Overrides = None,
    what: Annotated[
        Literal["experts", "lora", "gguf"],
        typer.Option(
            help="experts: a PEFT folder for each; lora: one for the whole mixture; gguf: what lora is, for llama.cpp."
        ),
    ] = "experts",
    names: Annotated[str | None, typer.Option(help="Names of the experts, `math,code,law`.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the one LoRA to this rank, by singular values.")] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Give each expert its mean weight where tokens route differently.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text file: one part for mean weights, another to measure the divergence on.")
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Take training examples for mean weights and test examples to measure.")
    ] = False,
    recipe: RecipeOption = None,
    context: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="What a router goes by, `task_ids=3` for example.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Use at most so many tokens of the text or data.")] = 20_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens of the text that are read together.")] = 512,
    each: Annotated[bool, typer.Option("--each", help="With gguf: a file for each expert instead.")] = False,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder of llama.cpp, whose converter is run; by default $LLAMA_CPP.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="With gguf: folder with the backbone's config.json.")] = None,
    outtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(help="With gguf: numbers in the file, f16 by default."),
    ] = None,
    backbone: Backbone = None,
    quantization: Quantization = None,
    as_json: AsJson = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Write LoRA adapters for PEFT or llama.cpp out of a mixture.

    Every expert by itself is exact: the mixture with that expert alone. One LoRA for the whole mixture is exact where
    the experts have the same weights for every token (one that is always on, a static router, a named task); where
    tokens route differently it is an approximation, made on request only, and its divergence from the mixture is
    measured. The backbone is loaded for an approximation, for measuring, or when `--backbone` names it.

    Example: `moelora export runs/quickstart -o loras`

    One LoRA: `moelora export runs/quickstart -o lora --what lora --approximate --text notes.txt`
    """
    of_experts = what == "experts" or each
    _refuse_idle(
        of_experts,
        what == "gguf",
        {
            "--names": names,
            "--rank": rank,
            "--approximate": approximate,
            "--text": text,
            "--data": data,
            "--recipe": recipe,
            "--context": context,
            "KEY=VALUE": overrides,
            "--each": each,
            "--llama-cpp": llama_cpp,
            "--base": base,
            "--outtype": outtype,
        },
    )
    from ..composition.writing import refuse_taken

    # Before a model is loaded for nothing.
    refuse_taken(output)
    hub = hub_options(revision, subfolder, token, cache_dir, local_files_only)
    options: dict[str, Any] = {**hub, **(_gguf(llama_cpp, base, outtype or "f16") if what == "gguf" else {})}
    if of_experts:
        done = _experts(path, output, {**options, "names": None if names is None else names.split(",")})
    else:
        options |= {"rank": rank, "approximate": approximate, "context": _context(context or [])}
        from_recipe = data or recipe is not None or bool(overrides)
        read = partial(read_questions, path, recipe, overrides, subfolder) if from_recipe else None
        source = _source(text, read, tokens, length)
        needs_model = approximate or source is not None or backbone is not None
        model = load_model(path, backbone, quantization, hub) if needs_model else None
        done = _lora(path, output, model, source, options)
    if as_json:
        print_json(done.to_dict())
    else:
        stdout().print(str(done), highlight=False, markup=False, soft_wrap=True)
        stdout().print(f"wrote {output}", highlight=False, markup=False)


def _refuse_idle(of_experts: bool, as_gguf: bool, given: Mapping[str, Any]) -> None:
    """Raise where an option would do nothing."""
    idle = (*_FOR_LORA,) if of_experts else _FOR_EXPERTS
    why = "is for one LoRA of the whole mixture: take --what lora" if of_experts else "is for --what experts"
    for names, reason in ((idle, why), (() if as_gguf else _FOR_GGUF, "is for --what gguf")):
        for name in names:
            if given[name]:
                raise ConfigError(f"{name} {reason}, or leave it out")


def _source(
    text: Path | None, read: Callable[[], Questions] | None, tokens: int, length: int
) -> _Words | _Examples | None:
    """Where batches come from, read before a model is.

    Args:
        read: gives the data section of a recipe, where data is wanted.
    """
    if text is not None and read is not None:
        raise ConfigError("--text and --data are both given: take one of the two")
    if text is not None:
        return _Words(_read(text), tokens, length)
    if read is None:
        return None
    from ..data import load_examples

    questions = read()
    assert questions.data is not None
    return _Examples(load_examples(questions.data), tokens, questions.max_length)


def _context(words: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"--context {word!r}: expected NAME=VALUE, such as task_ids=3")
        values[name] = int(value) if value.isdecimal() else value
    return values


def _gguf(llama_cpp: Path | None, base: Path | None, outtype: OutType) -> dict[str, Any]:
    from ..composition import Gguf

    return {"gguf": Gguf(llama_cpp, base, outtype)}


def _experts(path: str, output: Path, options: Mapping[str, Any]) -> Any:
    from rich.progress import Progress as Bars

    from ..composition import export_experts

    with Bars(console=stderr(), transient=True) as bars:
        return export_experts(path, output, progress=_teller(bars), **options)


def _lora(
    path: str, output: Path, model: MoELoRAModel | None, source: _Words | _Examples | None, options: dict[str, Any]
) -> Any:
    from rich.progress import Progress as Bars

    from ..composition import export_lora

    if model is not None and source is not None:
        if model.tokenizer is None:
            raise DataError(f"{path}: its backbone has no tokenizer to read text with: name one with --backbone")
        by_task = "task_ids" not in options["context"]
        options["batches"], options["held_out"] = source.batches(model.tokenizer, by_task)
    with Bars(console=stderr(), transient=True) as bars:
        return export_lora(model or path, output, progress=_teller(bars), **options)


def _teller(bars: Any) -> Progress:
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    return tell


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {file}: cannot be read as text ({error}): give a file in UTF-8") from None
