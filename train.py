"""Train a model: `python -u train.py config/tiny.yml [key=value ...]`; `python train.py --help` lists every key."""
import sys

from daisy.real_run import train_main

if __name__ == "__main__":
    sys.exit(train_main())
