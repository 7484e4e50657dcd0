"""What a recording is, and recordings that are made."""
