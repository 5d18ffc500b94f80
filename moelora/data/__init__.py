"""From examples to batches: reading, generating, mixing, streaming, chat templating, loss masks, packing, padding."""

from __future__ import annotations

from .chat import ChatFormat as ChatFormat
from .chat import TokenizedSet as TokenizedSet
from .chat import tokenize as tokenize
from .collate import Collator as Collator
from .examples import Example as Example
from .examples import Splits as Splits
from .examples import load_examples as load_examples
from .examples import mix as mix
from .examples import task_names as task_names
from .mixing import mixing_plan as mixing_plan
from .packing import PackedSet as PackedSet
from .packing import check_packing as check_packing
from .packing import packed as packed
from .preferences import Comparison as Comparison
from .preferences import Ranking as Ranking
from .preferences import read_rankings as read_rankings
from .preferences import write_rankings as write_rankings
from .ranking_set import RankingCollator as RankingCollator
from .ranking_set import RankingSet as RankingSet
from .ranking_set import ResponseFormat as ResponseFormat
from .sequences import SEQUENCES as SEQUENCES
from .sequences import Task as Task
from .sequences import TaskSequence as TaskSequence
from .sequences import read_sequence as read_sequence
from .sets import RecipeData as RecipeData
from .sets import read_data as read_data
from .streaming import StreamedSet as StreamedSet
