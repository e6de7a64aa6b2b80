"""Continue a text or answer a prompt: `python sample.py [CHECKPOINT] --prompt "..."`; `python sample.py --help` lists the options."""
import sys

from daisy.config import start

if __name__ == "__main__":
    sys.exit(start("daisy.real_run", "sample_main"))
