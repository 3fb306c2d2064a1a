"""`internvl-trainer` on a processor, where memory is limited: `… K STAGE …`.

K processes hold a model of an evaluation together, as on GPUs that are too small for one; with 0 the trainer chooses.

Free memory goes back to the system twice a second. glibc keeps the gaps that activations leave between small objects in
its heap, 200 MB in a step; on a GPU activations are not in host memory.
"""

import ctypes
import sys
import threading

from internvl_trainer.cli.main import main
from internvl_trainer.evaluate import weights

_EVERY = 0.5  # seconds


def _give_free_memory_back(ended: threading.Event) -> None:
    libc = ctypes.CDLL(None)
    while hasattr(libc, "malloc_trim") and not ended.wait(_EVERY):
        libc.malloc_trim(0)


if __name__ == "__main__":
    if processes := int(sys.argv[1]):
        vars(weights)["choose_copy"] = lambda *_: processes
    ended = threading.Event()
    threading.Thread(target=_give_free_memory_back, args=[ended], daemon=True).start()
    try:
        sys.exit(main(sys.argv[2:]))
    finally:
        ended.set()
