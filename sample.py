"""Continue a text or answer a prompt: `python sample.py [CHECKPOINT] --prompt "..."`; `python sample.py --help` lists the options."""
import sys

from daisy.real_run import sample_main

if __name__ == "__main__":
    sys.exit(sample_main())
