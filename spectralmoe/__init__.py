__version__ = "0.2.0"

from spectralmoe.moved import answer_for_old_paths

answer_for_old_paths()
