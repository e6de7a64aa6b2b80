"""Download FineWeb's GPT-2 shards: `python data/cached_fineweb100B.py [N]`; `--help` lists the options."""
import sys

from daisy.shards import fineweb_main

if __name__ == "__main__":
    sys.exit(fineweb_main())
