"""What the sub-packages share: files, settings, sound, recordings. Nothing here knows of a model."""
