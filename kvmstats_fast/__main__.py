"""``python -m kvmstats_fast`` is the script ``kvmstats``."""

import sys

from kvmstats_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
