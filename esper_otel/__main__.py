"""Lets ``python -m esper_otel`` run the command ``esper-otel``."""

import sys

from esper_otel.cli import main

if __name__ == "__main__":
    sys.exit(main())
