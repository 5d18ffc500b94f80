"""Task sequences for continual learning, by name.

| name | tasks | orders | from |
|---|---|---|---|
| ``reasoning-gym-8`` | eight procedural ones | a, b, c | made here |
| ``folder`` | the user's own | the user's own | JSONL files |
| ``trace`` | eight of TRACE | a | the released files |
| ``text-cl`` | up to 15 of text classification | 1 to 6, five-1 to five-4 | the released files |
| ``superni`` | 15 of SuperNI | 1, 2 | the released files |

Image sequences for CLIP are in ``image_sequences.py``.
"""

from __future__ import annotations

from ..config import SequenceData
from ..errors import ConfigError
from . import sequence_folder, sequence_gym, sequence_superni, sequence_text, sequence_trace  # noqa: F401 - they register
from .sequence_tasks import SEQUENCES as SEQUENCES
from .sequence_tasks import SequenceReader as SequenceReader
from .sequence_tasks import Task as Task
from .sequence_tasks import TaskSequence as TaskSequence
from .sequence_tasks import check_orders, chosen_order


def read_sequence(config: SequenceData) -> TaskSequence:
    """The sequence that a configuration describes; the same configuration always gives the same one.

    It has the tasks of the configured order, and the orders that these tasks allow.

    Raises:
        ConfigError: an unknown sequence or order, a missing path, or task types that are not those of the tasks.
        DataError: files or a package are missing, or the sequence is inconsistent, see :class:`Task`.
    """
    reader: SequenceReader = SEQUENCES.create(config.name, config)
    orders = reader.orders()
    names = chosen_order(config.name, orders, config.order)
    check_orders(
        config.name, {config.order or "first": names}, sorted({name for order in orders.values() for name in order})
    )
    types = config.task_types
    if types is not None and set(types) != set(names):
        raise ConfigError(
            f"data.task_types is about {', '.join(sorted(types))}, but the tasks are {', '.join(sorted(names))}: "
            "give each task its type"
        )
    tasks = tuple(reader.task(name) for name in names)
    possible = {order: others for order, others in orders.items() if set(others) <= set(names)}
    return TaskSequence(config.name, reader.version, tasks, possible)
