__version__ = "0.1.0"

from spectralmoe.moved import answer_for_old_paths

answer_for_old_paths()
