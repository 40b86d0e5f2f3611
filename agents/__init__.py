"""Atari policies with early exits: stable-baselines3, gymnasium, ale-py."""
