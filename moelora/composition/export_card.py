"""The model card of an exported adapter: where it comes from, what it is, and how far it is from that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from .. import __version__
from ..checkpoints.reading import is_hub_id
from .adapter import Adapter, Factors

# A module's row of a table is of no use by the hundred.
ROWS = 200


def adapter_card(adapter: Adapter, title: str, paragraphs: Sequence[str]) -> str:
    """The text of a README.md beside a PEFT adapter.

    Args:
        title: its heading. paragraphs: what is to be said of it, in Markdown.
    """
    return page(adapter, "peft", title, [*paragraphs, _table(adapter.factors), _load(adapter.backbone.name)])


def merged_card(adapter: Adapter) -> str:
    """The card of an adapter of which nothing is known but itself."""
    return adapter_card(adapter, adapter.name, [f"A LoRA adapter for `{adapter.backbone.name}`."])


def page(adapter: Adapter, library: str, title: str, paragraphs: Sequence[str]) -> str:
    """A card with the YAML at its top by which the hub finds and labels it."""
    front: dict[str, str | list[str]] = {"library_name": library, "tags": ["lora", "moelora"]}
    name = adapter.backbone.name
    if "/" in name and is_hub_id(name):
        front["base_model"] = name
    header = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    body = "\n\n".join([f"# {title}", *paragraphs, f"Written by moelora {__version__}."])
    return f"---\n{header}---\n\n{body}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; of a long one the beginning."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows[:ROWS]]
    if len(rows) > ROWS:
        lines.append(f"| and {len(rows) - ROWS} more |{' |' * (len(columns) - 1)}")
    return "\n".join(lines)


def _table(factors: Mapping[str, Factors]) -> str:
    kinds = Counter((path.rpartition(".")[2], each.rank, each.scale) for path, each in factors.items())
    rows = [[f"`{name}`", str(count), str(rank), f"{scale:.4g}"] for (name, rank, scale), count in kinds.items()]
    return table(["module", "how many", "rank", "scale"], rows)


def _load(backbone: str) -> str:
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(backbone)})\n"
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")\n```'
    )
