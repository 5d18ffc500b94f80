"""Finished LoRA adapters out of mixtures, as PEFT folders or GGUF files: every expert by itself, or all as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from ..model import MoELoRAModel
from .detached import Detached, detach
from .divergence import Batch, Divergence
from .export_card import adapter_card, page, table
from .gguf import OutType, base_folder, convert, find_converter, one_alpha
from .merging import Distance
from .pieces import Piece, Progress, Texts, experts_of, lora_of
from .writing import CARD, new_folder, refuse_taken

What = Literal["experts", "lora"]
Form = Literal["peft", "gguf"]


@dataclass(frozen=True)
class Written:
    """One adapter that was written.

    Attributes:
        name: of the adapter. file: relative to the folder of the export, ``"."`` for the folder itself.
        exact: it computes what it stands for, up to rounding.
        modules, ranks, parameters: how many modules, the ranks that they have, and how many numbers it holds.
        distance: what cutting its ranks lost, by module. divergence: from the mixture, as measured.
    """

    name: str
    file: str
    exact: bool
    modules: int
    ranks: list[int]
    parameters: int
    distance: Distance | None
    divergence: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **vars(self),
            "distance": None if self.distance is None else self.distance.to_dict(),
            "divergence": None if self.divergence is None else vars(self.divergence),
        }

    def __str__(self) -> str:
        ranks = "rank " + ", ".join(map(str, self.ranks))
        parts = [f"{self.name}: {'exact' if self.exact else 'an approximation'}, {self.modules} modules, {ranks}"]
        if self.distance is not None:
            parts.append(f"its updates are off by {self.distance.relative:.2%} through the cut of its ranks")
        if self.divergence is not None:
            parts.append(str(self.divergence))
        return "; ".join(parts)


@dataclass(frozen=True)
class Export:
    """What was written; ``str()`` of it has a line for each adapter.

    Attributes:
        what: every expert by itself, or all as one LoRA. form: of the files. source: of what.
        left_out: names of experts that have rank 0 everywhere: they are the frozen backbone, and have no file.
    """

    what: What
    form: Form
    source: str
    folder: Path
    adapters: list[Written]
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        adapters = [each.to_dict() for each in self.adapters]
        named = {"what": self.what, "form": self.form, "source": self.source, "folder": str(self.folder)}
        return {**named, "adapters": adapters, "left_out": self.left_out}

    def __str__(self) -> str:
        lines = [str(each) for each in self.adapters]
        return "\n".join([*lines, *(f"{name}: not written, it is the frozen backbone" for name in self.left_out)])


@dataclass(frozen=True)
class Gguf:
    """That an export is to be GGUF files of llama.cpp instead of PEFT folders.

    Attributes:
        llama_cpp: folder of llama.cpp, whose converter is run; by default that of the environment variable LLAMA_CPP.
        base: folder with the backbone's config.json; by default that of the backbone, if its name is a folder, else the
            converter asks the hub.
        outtype: of the numbers in the file.
    """

    llama_cpp: str | Path | None = None
    base: str | Path | None = None
    outtype: OutType = "f16"


def export_experts(
    source: MoELoRAModel | str | Path,
    folder: str | Path,
    *,
    names: Sequence[str] | None = None,
    gguf: Gguf | None = None,
    progress: Progress | None = None,
    **hub: Any,
) -> Export:
    """Write every expert of a mixture as a LoRA adapter of its own, into a folder for each.

    Each is exact: on the backbone it computes what the mixture does when this expert alone has the weight 1 at every
    site, also in blocks. What it is not is the mixture, whose router is lost. The backbone is not needed.

    Args:
        source: a checkpoint in any layout, or a model, which stays as it is. folder: new, or empty.
        names: of the experts; by default those of the adapters that they come from, or ``expert_00`` and so on.
        gguf: write GGUF files. progress: told of what takes long. **hub: as in :func:`moelora.from_pretrained`.

    Returns:
        What was written; the same is said in the README.md of each folder.

    Raises:
        CheckpointError: ``source`` cannot be read, or ``folder`` is taken or not writable.
        ConfigError: PEFT or llama.cpp cannot express an expert.
        UserError: llama.cpp's converter is missing or fails.
    """
    tell = progress or _silent
    refuse_taken(folder)
    script = None if gguf is None else find_converter(gguf.llama_cpp)
    mixture = detach(source, **hub)
    pieces, left_out = experts_of(mixture, names, tell)
    done = _write(mixture, pieces, Path(folder), gguf, script, tell, together=False)
    return replace(done, left_out=left_out)


def export_lora(
    source: MoELoRAModel | str | Path,
    folder: str | Path,
    *,
    rank: int | None = None,
    approximate: bool = False,
    batches: Iterable[Batch] = (),
    held_out: Iterable[Batch] = (),
    context: Mapping[str, Any] | None = None,
    gguf: Gguf | None = None,
    progress: Progress | None = None,
    **hub: Any,
) -> Export:
    """Write a whole mixture as one LoRA adapter.

    That is exact, with the ranks of all experts together, where their weights are the same for every token: for an
    expert that is always on, a static router, a task that ``context`` names. Everything else is an approximation by
    weights that do not depend on the token, which has to be asked for, and whose divergence from the mixture is
    measured.

    Args:
        source: a checkpoint in any layout, or a model, which stays as it is. Mean weights and measurements need the
            model. folder: new, or empty.
        rank: cut the adapter to this rank at each module, by singular values; the report says what that loses.
        approximate: where the weights of experts depend on the token, take those that the method merges with, or the
            mean over ``batches``; in blocks, mix the linears.
        batches: keywords of forwards, such as ``{"input_ids": ..., "attention_mask": ...}``. held_out: others, to
            measure the divergence on; without them it is measured on ``batches``.
        context: fields of the routing context, ``{"task_ids": 3}`` for example; the adapter is that task's.
        gguf, progress, **hub: as in :func:`export_experts`.

    Returns:
        What was written and how exact it is; the same is said in its README.md.

    Raises:
        CheckpointError: as :func:`export_experts`.
        ConfigError: the mixture is no LoRA, or PEFT or llama.cpp cannot express it.
        UserError: llama.cpp's converter is missing or fails.
    """
    tell = progress or _silent
    refuse_taken(folder)
    script = None if gguf is None else find_converter(gguf.llama_cpp)
    mixture = detach(source, **hub)
    piece = lora_of(
        mixture,
        source if isinstance(source, MoELoRAModel) else None,
        Path(folder).name,
        rank=rank,
        approximate=approximate,
        texts=Texts(list(batches), list(held_out)),
        context=context or {},
        tell=tell,
    )
    return _write(mixture, [piece], Path(folder), gguf, script, tell, together=True)


def _silent(what: str, done: int, total: int) -> None:
    """No one is told."""


def _write(
    mixture: Detached,
    pieces: Sequence[Piece],
    folder: Path,
    gguf: Gguf | None,
    script: Path | None,
    tell: Progress,
    together: bool,
) -> Export:
    """Write the pieces into a new folder: into itself where they are ``together``, which is one, else into folders."""
    what: What = "lora" if together else "experts"
    need = sum(4 * piece.whole.parameters for piece in pieces)
    with new_folder(folder, need) as staging:
        for index, piece in enumerate(pieces):
            tell("Writing adapters", index, len(pieces))
            if gguf is not None and script is not None:
                _write_gguf(piece, staging / _file(piece, gguf, together), gguf, script)
            else:
                own = staging / _file(piece, None, together)
                own.mkdir(exist_ok=True)
                piece.whole.write(own, adapter_card(piece.whole.adapter, piece.title, piece.says))
        if gguf is not None or not together:
            (staging / CARD).write_text(_overview(mixture, pieces, gguf, together), encoding="utf-8")
        tell("Writing adapters", len(pieces), len(pieces))
    written = [_written(piece, _file(piece, gguf, together)) for piece in pieces]
    return Export(what, "peft" if gguf is None else "gguf", mixture.source, folder, written)


def _file(piece: Piece, gguf: Gguf | None, together: bool) -> str:
    if gguf is not None:
        return f"{piece.name}.gguf"
    return "." if together else piece.name


def _write_gguf(piece: Piece, target: Path, gguf: Gguf, script: Path) -> None:
    whole = one_alpha(piece.whole)
    base = base_folder(whole.adapter.backbone.name, gguf.base)
    with TemporaryDirectory() as folder:
        whole.write(Path(folder), "")
        convert(whole, Path(folder), target, script, base, gguf.outtype)


def _written(piece: Piece, file: str) -> Written:
    factors = piece.whole.adapter.factors
    return Written(
        name=piece.name,
        file=file,
        exact=piece.exact,
        modules=len(factors),
        ranks=sorted({each.rank for each in factors.values()}),
        parameters=piece.whole.parameters,
        distance=piece.distance,
        divergence=piece.divergence,
    )


def _overview(mixture: Detached, pieces: Sequence[Piece], gguf: Gguf | None, together: bool) -> str:
    """The README.md of a folder that holds several adapters, or GGUF files, which have no card of their own."""
    rows = []
    for piece in pieces:
        found = _written(piece, _file(piece, gguf, together))
        rows.append([f"`{found.file}`", str(found.modules), ", ".join(map(str, found.ranks)), f"{found.parameters:,}"])
    says = pieces[0].says if together else [*pieces[0].says[:1], *_OF_EXPERTS]
    listed = table(["adapter", "modules", "rank", "parameters"], rows)
    how = [] if gguf is None else [_LLAMA_CPP.format(file=_file(pieces[0], gguf, together), outtype=gguf.outtype)]
    title = pieces[0].title if together else "The experts of a mixture, each as a LoRA adapter"
    return page(pieces[0].whole.adapter, "peft" if gguf is None else "gguf", title, [*says, listed, *how])


_OF_EXPERTS = [
    "Each computes what the mixture does when that expert alone has the weight 1 at every site. The mixture's router "
    "is in none of them."
]
_LLAMA_CPP = (
    "Converted by llama.cpp's `convert_lora_to_gguf.py` ({outtype}):\n\n"
    '```sh\nllama-cli -m backbone.gguf --lora {file} -p "..."\n```'
)
