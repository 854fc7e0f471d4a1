"""Causal language models: one decoder, and its Hugging Face form. Alone imports flax."""
