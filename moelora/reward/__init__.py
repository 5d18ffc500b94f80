"""Reward models: what people prefer, learnt by experts of one backbone."""
