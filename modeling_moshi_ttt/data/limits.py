"""The most that other people's files may ask of a process. What asks for more is refused by its name before it is read."""

SAMPLE_RATES = (4_000, 384_000)  # Hz, lowest and highest
CHANNELS = 64
LONGEST_RECORDING = 24 * 3600.0  # seconds
LONGEST_WHOLE = 4 * 3600.0  # seconds that are held in memory at once; longer ones are read in pieces
WORDS_BYTES = 64 * 2**20  # of a file of words
WORDS = 500_000  # of a recording; a day of quick talk has 350,000
LONGEST_WORD = 200  # characters
MANIFEST_LINE = 2**20  # characters
MEMBER_BYTES = 2**29  # of a sound in an archive, which is held in memory; a stereo hour of FLAC takes 300 MB
