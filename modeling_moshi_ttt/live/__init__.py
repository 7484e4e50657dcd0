"""Live conversations: sound in, sound and words out."""
