"""``python -m megatron_oreal`` is ``megatron-oreal``."""

import sys

from megatron_oreal.cli import main

if __name__ == "__main__":
    sys.exit(main())
