"""`python -m ilf_trt`, which `accelerate launch -m ilf_trt` needs."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
