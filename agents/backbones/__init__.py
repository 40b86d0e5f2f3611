"""Backbones of Atari policies, each a staged network built from a teacher's tensors."""
