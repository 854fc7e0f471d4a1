"""Causal language models: a decoder, and its Hugging Face form. Alone imports flax."""
