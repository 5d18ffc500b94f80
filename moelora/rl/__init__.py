"""Reinforcement learning of several tasks: their environments, and an agent with one trunk for all of them."""

from .environments import SIX_TASKS, Step, TaskConfig, TaskEnvironments, TaskError

__all__ = ["SIX_TASKS", "Step", "TaskConfig", "TaskEnvironments", "TaskError"]
