"""niels-gpt: make your own small language model on one ordinary machine."""

__version__ = "0.1.0"
