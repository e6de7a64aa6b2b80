"""Build shards for fine-tuning: `python build_sft_shards.py --source data.jsonl`; `python build_sft_shards.py --help` lists the options."""
import sys

from daisy.sft import main

if __name__ == "__main__":
    sys.exit(main())
