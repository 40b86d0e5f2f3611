"""Early exits for policies and classifiers: train once, run at any compute budget, skip what is skipped."""

__version__ = "0.1.0"
