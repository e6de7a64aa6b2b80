"""Train a model: `python -u train.py config/tiny.yml [key=value ...]`; `python train.py --help` lists every key."""
import sys

from daisy.config import start

if __name__ == "__main__":
    sys.exit(start("daisy.real_run", "train_main"))
