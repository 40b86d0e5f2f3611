"""Classifiers on the same exit core."""
