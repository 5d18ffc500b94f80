"""How well a model answers, by generation, likelihood and lm-evaluation-harness; how well it rewards and remembers."""

from __future__ import annotations

from .accuracy_matrix import AccuracyMatrix as AccuracyMatrix
from .continual import write_continual as write_continual
from .continual_comparison import MethodReport as MethodReport
from .continual_comparison import compare_methods as compare_methods
from .continual_comparison import write_comparison as write_comparison
from .harness import HarnessReport as HarnessReport
from .harness import load_tasks as load_tasks
from .harness import run_tasks as run_tasks
from .labels import OptionScores as OptionScores
from .labels import score_labels as score_labels
from .labels import score_options as score_options
from .labels import teacher_forced_match as teacher_forced_match
from .likelihood import likelihoods as likelihoods
from .reward_best_of_n import best_of_n as best_of_n
from .reward_calibration import calibration as calibration
from .reward_ensembles import RewardEnsemble as RewardEnsemble
from .rewards import judge as judge
from .rewards import score_rankings as score_rankings
from .scoring import Comparison as Comparison
from .scoring import Report as Report
from .scoring import TaskScore as TaskScore
from .scoring import compare as compare
from .scoring import generate_answers as generate_answers
from .scoring import majority as majority
from .scoring import score as score
from .scoring import score_answers as score_answers
