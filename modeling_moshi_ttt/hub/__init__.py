"""Checkpoints to the Hugging Face Hub and from it, checked on the way."""
