"""Build shards for fine-tuning: `python build_sft_shards.py --source data.jsonl`; `python build_sft_shards.py --help` lists the options."""
import sys

from daisy.config import start

if __name__ == "__main__":
    sys.exit(start("daisy.sft", "main"))
