"""Speech for the tests, from espeak-ng (the espeakng-loader package): no download, the same samples each time."""

import ctypes
from functools import cache

import espeakng_loader
import numpy as np

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_SYNCHRONOUS, _UTF8 = 2, 1
_RATE_PARAMETER = 1


@cache
def _library():
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_SetSynthCallback.argtypes = [_CALLBACK]
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise OSError("espeak-ng did not start")
    return library, rate


def say(text: str, voice: str = "en", words_per_minute: int = 175) -> tuple[np.ndarray, int]:
    """`text` spoken: (float32 samples in [-1, 1], sample rate)."""
    library, rate = _library()
    pieces: list[np.ndarray] = []

    @_CALLBACK
    def collect(samples, count, _events):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)
    library.espeak_SetVoiceByName(voice.encode())
    library.espeak_SetParameter(_RATE_PARAMETER, words_per_minute, 0)
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
    return np.concatenate(pieces).astype(np.float32) / 32768.0, rate
