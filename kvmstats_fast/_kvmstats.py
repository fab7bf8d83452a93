"""What is imported where the C core was not built: of this name, an import prefers a compiled module."""

import sys

_FOLDER = __file__.rpartition("/")[0]
raise ImportError(
    f"{_FOLDER} has no C core that was built for this Python ({sys.executable}): run `pip install -e .` in the folder "
    "above it, or change to another folder, so that an installed kvmstats_fast is imported instead"
)
