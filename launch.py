"""Start train.py in one or several processes, as run.sh does; `./run.sh --help` says how."""
import sys

from daisy.config import start

if __name__ == "__main__":
    sys.exit(start("daisy.real_run", "launch_main", __file__.replace("launch.py", "train.py"), program="run.sh"))
