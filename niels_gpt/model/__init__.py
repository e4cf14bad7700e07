"""The model and its parts, under the names by which others import them."""

from niels_gpt.model.blocks import Block, CausalSelfAttention, GeluMLP, RMSNorm, SwiGLU
from niels_gpt.model.gpt import GPT

__all__ = ["GPT", "Block", "CausalSelfAttention", "GeluMLP", "RMSNorm", "SwiGLU"]
