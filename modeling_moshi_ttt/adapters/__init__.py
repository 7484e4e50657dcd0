"""PEFT folders and the bases they stand on."""
